// What passes between the torch operators (cpu_kernel.cpp) and the arithmetic (cpu_rows.cpp, which is compiled once for
// each instruction set). No header of torch or of the C++ library with code in it may be included here: that code would
// be compiled with AVX-512 too, and the linker keeps one copy for all.

#pragma once
#include <cstdint>

namespace llmprune {

enum Kind : int { FLOAT32, FLOAT16, BFLOAT16, KINDS };  // of numbers

constexpr int64_t BLOCK = 64;  // columns that one 64-bit word of the bitmap describes
constexpr int SIZES = 4;       // a pass takes 1, 2, 4 or 8 tokens; TOKENS[size]
constexpr int64_t TOKENS[SIZES] = {1, 2, 4, 8};

// A packed matrix (rows, columns). Row n has its values from starts[n] to starts[n + 1], in order of the columns, or
// from n * row_length on if all rows keep the same number. Bit b of byte k of its bitmap stands for column 8k + b; bits
// beyond the last column are 0.
struct Matrix {
  const void* values;
  int64_t count;  // of values in all
  Kind kind;
  const uint8_t* index;  // rows * index_bytes
  int64_t index_bytes;
  const int64_t* starts;  // or null
  int64_t row_length;
  int64_t columns;
};

// y (tokens, rows) = x (tokens, columns) times the matrix, transposed, plus bias (rows,) or null.
// x comes as a panel, [columns / BLOCK, rounded up][tokens of the pass][BLOCK], filled up with zeros.
struct Product {
  Matrix weight;
  const void* panel;
  const void* bias;
  Kind bias_kind;
  void* y;
  Kind y_kind;
  int64_t rows;
  int64_t tokens;  // at most those of the pass
};

// x (tokens, columns) and where its panel goes, for a pass of `pass` tokens.
struct Input {
  const void* x;
  Kind kind;
  int64_t tokens, columns, pass;
  void* panel;
};

using Times = void (*)(const Product&, int64_t first_row, int64_t last_row);

// What one instruction set offers. `pair_times` multiplies bfloat16 by bfloat16 two products at a time; where the
// processor cannot, it is null.
struct Kernels {
  void (*fill)(const Input&);         // a panel of float32, for `times`
  bool (*fill_pairs)(const Input&);   // a panel of bfloat16, for `pair_times`; false: x has NaN or inf, take `times`
  Times times[KINDS][SIZES];          // by the kind of the values
  Times pair_times[SIZES];
  void (*expand)(const Matrix&, void* dense, int64_t first_row, int64_t last_row);  // dense (rows, columns)
};

Kernels kernels_avx2();
Kernels kernels_avx512();
Kernels kernels_avx512_bf16();

}  // namespace llmprune
