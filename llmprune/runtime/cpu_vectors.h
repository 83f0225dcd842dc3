// Vectors of one instruction set: packed values expanded to their columns, multiplied with x, or written out densely.
//
// For cpu_rows.cpp alone, which is compiled once per instruction set: all of this is in its anonymous namespace, so that
// the copies stay apart.

#pragma once
#include <immintrin.h>

#include <cstring>

#include "cpu_rows.h"

namespace llmprune {
namespace {

template <Kind kind>
struct Stored {
  using Value = uint16_t;
};
template <>
struct Stored<FLOAT32> {
  using Value = float;
};

// Numbers one at a time -----------------------------------------------------------------------------------------------

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float number;
  std::memcpy(&number, &wide, sizeof number);
  return number;
}

inline uint16_t to_bfloat16(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  if (number != number) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to the nearest, ties to even
}

inline float read(const void* from, Kind kind, int64_t i) {
  if (kind == FLOAT32) return static_cast<const float*>(from)[i];
  const uint16_t bits = static_cast<const uint16_t*>(from)[i];
  return kind == FLOAT16 ? _cvtsh_ss(bits) : from_bfloat16(bits);
}

inline void write(void* to, Kind kind, int64_t i, float number) {
  if (kind == FLOAT32) {
    static_cast<float*>(to)[i] = number;
  } else {
    const uint16_t bits = kind == FLOAT16 ? _cvtss_sh(number, _MM_FROUND_TO_NEAREST_INT) : to_bfloat16(number);
    static_cast<uint16_t*>(to)[i] = bits;
  }
}

// The bits of one block of columns; fewer bytes than eight at the end of a row.
inline uint64_t bitmap(const uint8_t* index, int64_t bytes) {
  uint64_t bits = 0;
  std::memcpy(&bits, index, bytes);
  return bits;
}

inline int count(uint64_t bits) { return static_cast<int>(_mm_popcnt_u64(bits)); }
inline uint64_t lowest(uint64_t bits, int number) { return bits & ((uint64_t{1} << number) - 1); }  // number < 64

// Vectors -------------------------------------------------------------------------------------------------------------
//
// A `Float<kind>` expands WIDTH columns of a row to float32 and multiplies them with float32. Its `last` is for the end
// of the values, where loading a whole vector could reach beyond the memory that is ours.

#if defined(__AVX512F__)

using Sum = __m512;
inline Sum zero() { return _mm512_setzero_ps(); }
inline Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

// Which of a vector's elements hold values that belong to `kept`: with `last` the others are not even looked at.
template <bool last>
inline uint64_t present(uint64_t kept) {
  return last ? lowest(~0ull, count(kept)) : ~0ull;
}

template <bool last>
inline __m256i load16(const uint16_t* from, uint64_t kept) {
  return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(present<last>(kept)), from);
}

template <bool last>
inline __m512 load16(const float* from, uint64_t kept) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(present<last>(kept)), from);
}

template <Kind kind>
inline __m512 widened(__m256i numbers) {
  if constexpr (kind == FLOAT16) return _mm512_cvtph_ps(numbers);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

template <Kind kind>
struct Float {
  static constexpr int WIDTH = 16;
  using Value = typename Stored<kind>::Value;
  using X = float;
  struct Weights {
    __m512 numbers;
    __mmask16 kept;
  };

  template <bool last>
  static Weights expanded(const Value* from, uint64_t bits) {
    const __mmask16 kept = static_cast<__mmask16>(bits);
    __m512 packed;
    if constexpr (kind == FLOAT32) {
      packed = load16<last>(from, bits);
    } else {
      packed = widened<kind>(load16<last>(from, bits));
    }
    return {_mm512_maskz_expand_ps(kept, packed), kept};
  }

  static Sum multiply_add(const Weights& weights, const float* x, Sum sum) {
    return _mm512_mask3_fmadd_ps(weights.numbers, _mm512_loadu_ps(x), sum, weights.kept);
  }
};

#else  // AVX2

using Sum = __m256;
inline Sum zero() { return _mm256_setzero_ps(); }
inline Sum add(Sum a, Sum b) { return _mm256_add_ps(a, b); }
inline float total(Sum sum) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// AVX2 has no instruction that expands. For each of the 256 bytes of a bitmap: eight bytes, one for each column, 0
// where it is dropped, otherwise 0x80 + which of the values goes there. The sign says what is kept, the lowest three bits are
// what `vpermd` wants.
struct Lanes {
  uint64_t of[256];
  constexpr Lanes() : of() {
    for (int bits = 0; bits < 256; ++bits) {
      uint64_t next = 0;
      for (int column = 0; column < 8; ++column) {
        if (bits >> column & 1) of[bits] |= (0x80 + next++) << 8 * column;
      }
    }
  }
};
constexpr Lanes LANES;

// Eight values, as they lie in memory, in the lower part of the vector if they are 16 bits wide.
template <bool last, class Value>
inline __m256i load8(const Value* from, uint64_t bits) {
  if constexpr (last) {
    Value copy[8] = {};
    std::memcpy(copy, from, count(bits) * sizeof(Value));
    return load8<false>(copy, bits);
  } else if constexpr (sizeof(Value) == 4) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  } else {
    return _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
}

template <Kind kind>
struct Float {
  static constexpr int WIDTH = 8;
  using Value = typename Stored<kind>::Value;
  using X = float;
  struct Weights {
    __m256 numbers;
    __m256 kept;
  };

  template <bool last>
  static Weights expanded(const Value* from, uint64_t bits) {
    const __m256i lanes = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(LANES.of[bits & 0xff])));
    const __m256 kept = _mm256_castsi256_ps(_mm256_srai_epi32(lanes, 31));
    const __m256i stored = load8<last>(from, bits & 0xff);
    __m256 packed;
    if constexpr (kind == FLOAT32) {
      packed = _mm256_castsi256_ps(stored);
    } else if constexpr (kind == FLOAT16) {
      packed = _mm256_cvtph_ps(_mm256_castsi256_si128(stored));
    } else {
      const __m256i wide = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(stored));
      packed = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    return {_mm256_and_ps(_mm256_permutevar8x32_ps(packed, lanes), kept), kept};
  }

  static Sum multiply_add(const Weights& weights, const float* x, Sum sum) {
    return _mm256_fmadd_ps(weights.numbers, _mm256_and_ps(_mm256_loadu_ps(x), weights.kept), sum);
  }
};

#endif

#if defined(__AVX512VBMI2__)

// 32 16-bit values, each where its column is, zeros between.
template <bool last>
inline __m512i expanded32(const uint16_t* from, uint64_t bits) {
  const __m512i packed = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(present<last>(bits)), from);
  return _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits), packed);
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#define LLMPRUNE_PAIRS 1

// 32 columns at a time: bfloat16 values are expanded as they are, and neighbours are multiplied and added in pairs.
// A dropped weight is a 0 here, so x must be finite.
struct Pairs {
  static constexpr int WIDTH = 32;
  using Value = uint16_t;
  using X = uint16_t;

  template <bool last>
  static __m512i expanded(const Value* from, uint64_t bits) {
    return expanded32<last>(from, bits);
  }

  static Sum multiply_add(__m512i weights, const X* x, Sum sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(x));
  }
};
#endif

// Dense columns -------------------------------------------------------------------------------------------------------
//
// `spread` writes WIDTH columns of a row, bit for bit: no number is computed with.

#if defined(__AVX512F__)

template <class Value>
struct Copy;

template <>
struct Copy<float> {
  static constexpr int WIDTH = 16;
  template <bool last>
  static void spread(const float* from, uint64_t bits, float* to) {
    _mm512_storeu_ps(to, _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), load16<last>(from, bits)));
  }
};

template <>
struct Copy<uint16_t> {
#if defined(__AVX512VBMI2__)
  static constexpr int WIDTH = 32;
  template <bool last>
  static void spread(const uint16_t* from, uint64_t bits, uint16_t* to) {
    _mm512_storeu_si512(to, expanded32<last>(from, bits));
  }
#else
  static constexpr int WIDTH = 16;
  template <bool last>
  static void spread(const uint16_t* from, uint64_t bits, uint16_t* to) {
    const __m512i wide = _mm512_cvtepu16_epi32(load16<last>(from, bits));
    const __m512i placed = _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), wide);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(placed));
  }
#endif
};

#else  // AVX2

template <class Value>
struct Copy {
  static constexpr int WIDTH = 8;
  template <bool last>
  static void spread(const Value* from, uint64_t bits, Value* to) {
    const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(LANES.of[bits]));
    const __m256i stored = load8<last>(from, bits);
    if constexpr (sizeof(Value) == 4) {
      const __m256i lanes = _mm256_cvtepi8_epi32(bytes);
      const __m256i placed = _mm256_permutevar8x32_epi32(stored, lanes);
      const __m256i kept = _mm256_srai_epi32(lanes, 31);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_and_si256(placed, kept));
    } else {
      // Two bytes for each lane: 2 * lane and 2 * lane + 1; 0x80 and more makes `pshufb` write a 0.
      const __m128i lanes = _mm_unpacklo_epi8(bytes, bytes);
      const __m128i dropped = _mm_andnot_si128(lanes, _mm_set1_epi8(static_cast<char>(0x80)));
      const __m128i which = _mm_and_si128(lanes, _mm_set1_epi8(7));
      const __m128i order = _mm_add_epi8(_mm_add_epi8(which, which), _mm_set1_epi16(0x0100));
      const __m128i placed = _mm_shuffle_epi8(_mm256_castsi256_si128(stored), _mm_or_si128(order, dropped));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), placed);
    }
  }
};

#endif

}  // namespace
}  // namespace llmprune
