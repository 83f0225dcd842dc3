// The torch operators llmprune::cpu_matmul, cpu_expand and cpu_levels: checks, threads, and the choice of the
// instruction set. The arithmetic is in cpu_rows.cpp; the operators' schemas are in cpu.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cpu_rows.h"

namespace llmprune {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Level {
  std::string name;
  Kernels kernels;
};

// What this processor can do, the best first. It is asked at run time, so that a cache folder that several machines
// share holds one file for all.
const std::vector<Level>& levels() {
  static const std::vector<Level> found = [] {
    std::vector<Level> able;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool pairs = avx512 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
    if (pairs) able.push_back({"avx512_bf16", kernels_avx512_bf16()});
    if (avx512) able.push_back({"avx512", kernels_avx512()});
    if (avx2) able.push_back({"avx2", kernels_avx2()});
    return able;
  }();
  return found;
}

const Kernels& kernels_at(int64_t level) {
  TORCH_CHECK(level >= 0 && level < static_cast<int64_t>(levels().size()), "no instruction set number ", level);
  return levels()[level].kernels;
}

Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return FLOAT32;
    case at::kHalf:
      return FLOAT16;
    case at::kBFloat16:
      return BFLOAT16;
    default:
      TORCH_CHECK(false, "float32, float16 or bfloat16 expected, not ", tensor.scalar_type());
  }
}

Matrix matrix_of(const Tensor& values, const Tensor& index, const OptionalTensor& starts, int64_t columns) {
  TORCH_CHECK(index.dim() == 2 && index.scalar_type() == at::kByte && index.size(1) == (columns + 7) / 8,
              "the index of ", columns, " columns must be uint8 (rows, ", (columns + 7) / 8, "), not ", index.sizes());
  TORCH_CHECK(values.is_contiguous() && index.is_contiguous(), "values and index must be contiguous");
  const int64_t rows = index.size(0);
  const int64_t* row_starts = nullptr;
  if (starts) {
    TORCH_CHECK(starts->scalar_type() == at::kLong && starts->is_contiguous() && starts->numel() == rows + 1,
                "starts must be int64 (", rows + 1, ",), not ", starts->sizes());
    row_starts = starts->const_data_ptr<int64_t>();
    TORCH_CHECK(row_starts[rows] == values.numel(), values.numel(), " values do not fit starts");
  } else {
    TORCH_CHECK(values.dim() == 2 && values.size(0) == rows, "without starts, values must be (", rows,
                ", kept of each row), not ", values.sizes());
  }
  return {values.const_data_ptr(),
          values.numel(),
          kind_of(values),
          index.const_data_ptr<uint8_t>(),
          index.size(1),
          row_starts,
          row_starts ? 0 : values.size(1),
          columns};
}

// A thread is worth waking for so many columns, of all its rows together.
constexpr int64_t GRAIN = 1 << 16;

int64_t rows_per_thread(int64_t columns) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, columns)); }

// Memory for a panel, kept for the next call; at a multiple of 64 bytes.
void* scratch(size_t bytes) {
  static thread_local std::vector<std::byte> memory;
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
}

// y for up to eight tokens, in one pass over the weights.
void multiply(const Kernels& kernels, Product product, Input input) {
  int size = 0;
  while (TOKENS[size] < input.tokens) ++size;
  input.pass = TOKENS[size];
  const int64_t blocks = (input.columns + BLOCK - 1) / BLOCK;
  input.panel = scratch(blocks * BLOCK * input.pass * sizeof(float));
  product.panel = input.panel;
  product.tokens = input.tokens;
  const bool both = product.weight.kind == BFLOAT16 && input.kind == BFLOAT16;
  const bool pairs = both && kernels.fill_pairs && kernels.fill_pairs(input);
  if (!pairs) kernels.fill(input);
  const Times times = pairs ? kernels.pair_times[size] : kernels.times[product.weight.kind][size];
  at::parallel_for(0, product.rows, rows_per_thread(input.columns),
                   [&](int64_t first, int64_t last) { times(product, first, last); });
}

Tensor cpu_matmul(const Tensor& x, const Tensor& values, const Tensor& index, const OptionalTensor& starts,
                  const OptionalTensor& bias, int64_t in_features, int64_t level) {
  const Matrix weight = matrix_of(values, index, starts, in_features);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == in_features, "x must be (..., ", in_features, "), not ", x.sizes());
  const Kind kind = kind_of(x);
  TORCH_CHECK(kind == weight.kind || kind == FLOAT32, "x must be ", values.scalar_type(), " or float32, not ",
              x.scalar_type());
  const int64_t rows = index.size(0);
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = rows;
  Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  const Tensor inputs = x.contiguous();
  Product product = {weight, nullptr, nullptr, FLOAT32, nullptr, kind, rows, 0};
  Tensor added;
  if (bias) {
    TORCH_CHECK(bias->numel() == rows, "bias must be (", rows, ",), not ", bias->sizes());
    added = bias->contiguous();
    product.bias = added.const_data_ptr();
    product.bias_kind = kind_of(added);
  }
  const Kernels& kernels = kernels_at(level);
  const char* from = static_cast<const char*>(inputs.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t tokens = y.numel() / rows, most = TOKENS[SIZES - 1], bytes = x.element_size();
  for (int64_t first = 0; first < tokens; first += most) {
    product.y = to + first * rows * bytes;
    multiply(kernels, product,
             {from + first * in_features * bytes, kind, std::min(most, tokens - first), in_features, 0, nullptr});
  }
  return y;
}

void cpu_expand(const Tensor& values, const Tensor& index, const OptionalTensor& starts, const Tensor& out,
                int64_t in_features, int64_t level) {
  const Matrix matrix = matrix_of(values, index, starts, in_features);
  TORCH_CHECK(out.is_contiguous() && out.scalar_type() == values.scalar_type() && out.dim() == 2 &&
                  out.size(0) == index.size(0) && out.size(1) == in_features,
              "out must be contiguous, ", values.scalar_type(), " (", index.size(0), ", ", in_features, "), not ",
              out.scalar_type(), " ", out.sizes());
  const Kernels& kernels = kernels_at(level);
  void* dense = out.mutable_data_ptr();
  at::parallel_for(0, index.size(0), rows_per_thread(in_features),
                   [&](int64_t first, int64_t last) { kernels.expand(matrix, dense, first, last); });
}

std::vector<std::string> cpu_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.name);
  return names;
}

}  // namespace
}  // namespace llmprune

TORCH_LIBRARY_FRAGMENT(llmprune, library) { library.def("cpu_levels() -> str[]", &llmprune::cpu_levels); }

TORCH_LIBRARY_IMPL(llmprune, CPU, library) {
  library.impl("cpu_matmul", &llmprune::cpu_matmul);
  library.impl("cpu_expand", &llmprune::cpu_expand);
}
