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

#include <cstring>

#include "cpu_rows.h"
#include "cpu_vectors.h"

namespace llmprune {
namespace {

inline int64_t row_start(const Matrix& matrix, int64_t n) {
  return matrix.starts ? matrix.starts[n] : n * matrix.row_length;
}

// Whether whole vectors can be loaded to the end of row n without leaving the values. Rows after one without have none.
inline bool has_room(const Matrix& matrix, int64_t n) { return row_start(matrix, n + 1) + BLOCK <= matrix.count; }

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
