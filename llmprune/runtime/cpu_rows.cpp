// A packed matrix times a few tokens, row by row, and a packed matrix made dense.
//
// The idea: a row's kept values lie one after another in memory, so a vector of them is one plain load; the bitmap then
// says where they go (`vpexpand`), and the result is multiplied with x as a dense row would be. Nothing but 1 bit per
// column and the kept values is read, and with one token reading is what takes the time.
//
// A dropped weight does not exist: whatever x holds there, NaN and infinity too, never reaches a sum.
//
// This file is compiled once per instruction set (cpu_build.py has the flags), with KERNELS the name of the function
// that hands out what it holds. Everything else is in an anonymous namespace, so that the copies stay apart.

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

inline int64_t row_start(const Matrix& matrix, int64_t n) {
  return matrix.starts ? matrix.starts[n] : n * matrix.row_length;
}

// Whether whole vectors can be loaded to the end of row n without leaving the values. Rows after one without have none.
inline bool has_room(const Matrix& matrix, int64_t n) { return row_start(matrix, n + 1) + BLOCK <= matrix.count; }

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

// A row ---------------------------------------------------------------------------------------------------------------

// Independent sums for each token, so that one addition need not wait for the one before.
constexpr int chains(int tokens) { return tokens >= 8 ? 1 : tokens >= 4 ? 2 : 4; }

// One block of columns; `half` says which of two neighbours it is. Returns where the next block's values begin: one
// addition, the only thing that the next block has to wait for.
template <class Math, int M, bool last, int half>
inline const typename Math::Value* block(const typename Math::Value* values, uint64_t bits, const typename Math::X* x,
                                         Sum (&sums)[M][chains(M)]) {
  constexpr int STEPS = BLOCK / Math::WIDTH;
  // With few tokens the processor sees by itself what is read next; with several the reads are too far apart, and a
  // line a block, which half of the 16-bit values fill, makes a fifth (measured on Zen 4; with float32 it does harm).
  if constexpr (M >= 4 && sizeof(*values) == 2) _mm_prefetch(reinterpret_cast<const char*>(values) + 1024, _MM_HINT_T0);
#pragma GCC unroll 8
  for (int step = 0; step < STEPS; ++step) {
    const auto* from = values + count(lowest(bits, step * Math::WIDTH));
    const auto weights = Math::template expanded<last>(from, lowest(bits >> step * Math::WIDTH, Math::WIDTH));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Sum& sum = sums[m][(half * STEPS + step) % chains(M)];
      sum = Math::multiply_add(weights, x + m * BLOCK + step * Math::WIDTH, sum);
    }
  }
  return values + count(bits);
}

template <class Math, int M, bool last>
inline void row(const typename Math::Value* values, const uint8_t* index, int64_t columns, const typename Math::X* x,
                float (&totals)[M]) {
  Sum sums[M][chains(M)];
  for (auto& of_token : sums) {
    for (Sum& sum : of_token) sum = zero();
  }
  const int64_t blocks = columns / BLOCK, rest = columns % BLOCK;
  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2, x += 2 * M * BLOCK) {
    values = block<Math, M, last, 0>(values, bitmap(index + 8 * b, 8), x, sums);
    values = block<Math, M, last, 1>(values, bitmap(index + 8 * b + 8, 8), x + M * BLOCK, sums);
  }
  if (b < blocks) {
    values = block<Math, M, last, 0>(values, bitmap(index + 8 * b, 8), x, sums);
    ++b, x += M * BLOCK;
  }
  if (rest) block<Math, M, last, 1>(values, bitmap(index + 8 * b, (rest + 7) / 8), x, sums);
  for (int m = 0; m < M; ++m) {
    for (int c = 1; c < chains(M); ++c) sums[m][0] = add(sums[m][0], sums[m][c]);
    totals[m] = total(sums[m][0]);
  }
}

template <class Math, int M, bool last>
inline void multiply(const Product& product, int64_t n) {
  const Matrix& weight = product.weight;
  const auto* values = static_cast<const typename Math::Value*>(weight.values) + row_start(weight, n);
  float totals[M];
  row<Math, M, last>(values, weight.index + n * weight.index_bytes, weight.columns,
                     static_cast<const typename Math::X*>(product.panel), totals);
  const float bias = product.bias ? read(product.bias, product.bias_kind, n) : -0.0f;  // what changes no number
  for (int64_t m = 0; m < product.tokens; ++m) {
    write(product.y, product.y_kind, m * product.rows + n, totals[m] + bias);
  }
}

template <class Math, int M>
void times(const Product& product, int64_t first_row, int64_t last_row) {
  int64_t n = first_row;
  for (; n < last_row && has_room(product.weight, n); ++n) multiply<Math, M, false>(product, n);
  for (; n < last_row; ++n) multiply<Math, M, true>(product, n);
}

// Panels of x ---------------------------------------------------------------------------------------------------------

template <Kind kind>
inline void to_floats(const typename Stored<kind>::Value* from, int64_t number, float* to) {
  int64_t i = 0;
  if constexpr (kind == FLOAT16) {
    for (; i + 8 <= number; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
  for (; i < number; ++i) to[i] = read(from, kind, i);
}

template <class X, class Copy>
inline void fill_blocks(const Input& input, Copy copy) {
  X* panel = static_cast<X*>(input.panel);
  for (int64_t k = 0; k < input.columns; k += BLOCK) {
    const int64_t number = input.columns - k < BLOCK ? input.columns - k : BLOCK;
    for (int64_t m = 0; m < input.pass; ++m, panel += BLOCK) {
      if (m >= input.tokens || number < BLOCK) std::memset(panel, 0, BLOCK * sizeof(X));
      if (m < input.tokens) copy(m * input.columns + k, number, panel);
    }
  }
}

template <Kind kind>
void fill_from(const Input& input) {
  const auto* x = static_cast<const typename Stored<kind>::Value*>(input.x);
  fill_blocks<float>(input, [x](int64_t at, int64_t number, float* panel) { to_floats<kind>(x + at, number, panel); });
}

void fill(const Input& input) {
  constexpr void (*BY_KIND[KINDS])(const Input&) = {fill_from<FLOAT32>, fill_from<FLOAT16>, fill_from<BFLOAT16>};
  BY_KIND[input.kind](input);
}

#ifdef LLMPRUNE_PAIRS
bool fill_pairs(const Input& input) {
  const auto* x = static_cast<const uint16_t*>(input.x);
  uint16_t not_finite = 0;
  fill_blocks<uint16_t>(input, [x, &not_finite](int64_t at, int64_t number, uint16_t* panel) {
    std::memcpy(panel, x + at, number * sizeof(uint16_t));
    uint16_t found = 0;
    for (int64_t i = 0; i < BLOCK; ++i) found |= (panel[i] & 0x7f80) == 0x7f80;  // an exponent of ones
    not_finite |= found;
  });
  return !not_finite;
}
#endif

// Packed to dense -----------------------------------------------------------------------------------------------------
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

template <class Value, bool last>
inline const Value* spread_block(const Value* values, uint64_t bits, Value* to) {
  constexpr int WIDTH = Copy<Value>::WIDTH;
#pragma GCC unroll 8
  for (int at = 0; at < BLOCK; at += WIDTH) {
    Copy<Value>::template spread<last>(values + count(lowest(bits, at)), lowest(bits >> at, WIDTH), to + at);
  }
  return values + count(bits);
}

template <class Value, bool last>
inline void spread_row(const Value* values, const uint8_t* index, int64_t columns, Value* to) {
  int64_t k = 0;
  for (; k + BLOCK <= columns; k += BLOCK) {
    values = spread_block<Value, last>(values, bitmap(index + k / 8, 8), to + k);
  }
  if (const int64_t rest = columns - k) {
    Value whole[BLOCK];
    spread_block<Value, last>(values, bitmap(index + k / 8, (rest + 7) / 8), whole);
    std::memcpy(to + k, whole, rest * sizeof(Value));
  }
}

template <class Value>
void expand_as(const Matrix& matrix, void* dense, int64_t first_row, int64_t last_row) {
  for (int64_t n = first_row; n < last_row; ++n) {
    const Value* values = static_cast<const Value*>(matrix.values) + row_start(matrix, n);
    const auto spread = has_room(matrix, n) ? spread_row<Value, false> : spread_row<Value, true>;
    spread(values, matrix.index + n * matrix.index_bytes, matrix.columns,
           static_cast<Value*>(dense) + n * matrix.columns);
  }
}

void expand(const Matrix& matrix, void* dense, int64_t first_row, int64_t last_row) {
  (matrix.kind == FLOAT32 ? expand_as<float> : expand_as<uint16_t>)(matrix, dense, first_row, last_row);
}

}  // namespace

#define LLMPRUNE_SIZES(Math) {times<Math, 1>, times<Math, 2>, times<Math, 4>, times<Math, 8>}

Kernels KERNELS() {
  Kernels kernels = {fill,
                     nullptr,
                     {LLMPRUNE_SIZES(Float<FLOAT32>), LLMPRUNE_SIZES(Float<FLOAT16>), LLMPRUNE_SIZES(Float<BFLOAT16>)},
                     {},
                     expand};
#ifdef LLMPRUNE_PAIRS
  kernels.fill_pairs = fill_pairs;
  const Times pairs[SIZES] = LLMPRUNE_SIZES(Pairs);
  for (int size = 0; size < SIZES; ++size) kernels.pair_times[size] = pairs[size];
#endif
  return kernels;
}

}  // namespace llmprune
