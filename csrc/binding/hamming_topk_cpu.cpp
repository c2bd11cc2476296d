#include "hashengine/hamming_topk.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "check.h"

namespace hashengine::binding {
namespace {

std::tuple<at::Tensor, at::Tensor> topk_cpu(const at::Tensor& queries, const at::Tensor& codes, int64_t k) {
  const char* op = "hamming_topk";
  check_codes(queries, op, "queries");
  check_codes(codes, op, "codes");
  TORCH_CHECK_VALUE(queries.dim() == 2 && queries.size(1) > 0, op, ": queries must be [rows, bits / 8], got ",
                    queries.sizes());
  TORCH_CHECK_VALUE(codes.dim() == 2 && codes.size(1) > 0, op, ": codes must be [rows, bits / 8], got ", codes.sizes());
  TORCH_CHECK_VALUE(queries.size(1) == codes.size(1), op, ": queries and codes must have the same width, got ",
                    8 * queries.size(1), " and ", 8 * codes.size(1), " bits");
  TORCH_CHECK_VALUE(queries.device() == codes.device(), op, ": queries and codes must be on one device, got ",
                    queries.device(), " and ", codes.device());
  TORCH_CHECK_VALUE(1 <= k && k <= codes.size(0), op, ": k must be 1 to the number of codes (", codes.size(0),
                    "), got ", k);
  const at::Tensor query_rows = queries.contiguous();
  const at::Tensor code_rows = codes.contiguous();
  at::Tensor distances = at::empty({queries.size(0), k}, queries.options().dtype(at::kInt));
  at::Tensor positions = at::empty({queries.size(0), k}, queries.options().dtype(at::kLong));
  SimdLevel level;
  try {
    level = chosen_simd_level();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
  hamming_topk_cpu({query_rows.const_data_ptr<uint8_t>(), code_rows.const_data_ptr<uint8_t>(), queries.size(0),
                    codes.size(0), codes.size(1), k, distances.mutable_data_ptr<int32_t>(),
                    positions.mutable_data_ptr<int64_t>()},
                   level, torch_thread_pool());
  return {distances, positions};
}

TORCH_LIBRARY_IMPL(hashengine, CPU, library) { library.impl("hamming_topk", topk_cpu); }

}  // namespace
}  // namespace hashengine::binding
