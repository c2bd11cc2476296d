#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <memory>
#include <tuple>
#include <vector>

#include "binding/hamming.h"
#include "hashengine/huge_pages.h"

namespace hashengine::binding {
namespace {

// An uninitialised tensor, on huge pages if the system grants them. They reduce the page faults of the first write to
// results of many megabytes.
at::Tensor empty_results(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor results = at::empty(sizes, at::TensorOptions(dtype));
  use_huge_pages(results.mutable_data_ptr(), int64_t(results.nbytes()));
  return results;
}

std::tuple<at::Tensor, at::Tensor> topk_cpu(const at::Tensor& queries, const at::Tensor& codes, int64_t k,
                                            const std::optional<at::Tensor>& filter, int64_t num_threads) {
  const HammingArguments arguments("hamming_topk", queries, codes, filter, num_threads);
  check_k(arguments.search, k);
  const at::Tensor distances = empty_results({queries.size(0), k}, at::kInt);
  const at::Tensor positions = empty_results({queries.size(0), k}, at::kLong);
  hamming_topk_cpu(arguments.search, k, distances.mutable_data_ptr<int32_t>(), positions.mutable_data_ptr<int64_t>(),
                   simd_level(), torch_thread_pool(num_threads));
  return {distances, positions};
}

// A tensor that takes ownership of `values` without a copy.
template <typename T>
at::Tensor as_tensor(std::unique_ptr<T[]> values, int64_t count, at::ScalarType dtype) {
  T* const data = values.release();
  return at::from_blob(data, {count}, [data](void*) { delete[] data; }, at::TensorOptions(dtype));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> range_cpu(const at::Tensor& queries, const at::Tensor& codes,
                                                         int64_t radius, const std::optional<at::Tensor>& filter,
                                                         std::optional<int64_t> max_results, int64_t num_threads) {
  const HammingArguments arguments("hamming_range", queries, codes, filter, num_threads);
  const int64_t limit = check_range_limits(arguments.search, radius, max_results);
  HammingRangeResult result = hamming_range_cpu(arguments.search, radius, std::max<int64_t>(limit, 1), simd_level(),
                                                torch_thread_pool(num_threads));
  const at::Tensor lims = at::empty({int64_t(result.lims.size())}, at::TensorOptions(at::kLong));
  std::copy(result.lims.begin(), result.lims.end(), lims.mutable_data_ptr<int64_t>());
  const int64_t count = result.count();
  return {lims, as_tensor(std::move(result.distances), count, at::kInt),
          as_tensor(std::move(result.positions), count, at::kLong)};
}

// Converts labels to rows of 64-bit words: an integer label to one word, a multi-hot row to one bit per label.
std::vector<uint64_t> label_words(const at::Tensor& labels) {
  const at::Tensor rows = labels.contiguous();
  if (rows.dim() == 1) {
    const int64_t* integers = rows.const_data_ptr<int64_t>();
    return {integers, integers + rows.numel()};
  }
  const int64_t columns = rows.size(1), words = label_word_count(rows);
  std::vector<uint64_t> bits(size_t(rows.size(0) * words));
  const bool* multi_hot = rows.const_data_ptr<bool>();
  for (int64_t row = 0; row < rows.size(0); ++row)
    for (int64_t column = 0; column < columns; ++column)
      bits[size_t(row * words + column / 64)] |= uint64_t(multi_hot[row * columns + column]) << column % 64;
  return bits;
}

std::tuple<at::Tensor, at::Tensor> count_cpu(const at::Tensor& queries, const at::Tensor& codes,
                                             const std::optional<at::Tensor>& filter,
                                             const std::optional<at::Tensor>& query_labels,
                                             const std::optional<at::Tensor>& code_labels, int64_t num_threads) {
  const HammingArguments arguments("hamming_count", queries, codes, filter, num_threads);
  check_labels(arguments, query_labels, code_labels);
  std::vector<uint64_t> query_words, code_words;
  HammingLabels labels{};
  if (code_labels) {
    query_words = label_words(*query_labels);
    code_words = label_words(*code_labels);
    labels = {query_words.data(), code_words.data(), label_word_count(*code_labels), code_labels->dim() == 2};
  }
  auto [counts, relevant] = empty_counts(arguments, code_labels.has_value());
  hamming_count_cpu(arguments.search, code_labels ? &labels : nullptr, counts.mutable_data_ptr<int64_t>(),
                    relevant.mutable_data_ptr<int64_t>(), simd_level(), torch_thread_pool(num_threads));
  return {counts, relevant};
}

TORCH_LIBRARY_IMPL(hashengine, CPU, library) {
  library.impl("hamming_topk", topk_cpu);
  library.impl("hamming_range", range_cpu);
  library.impl("hamming_count", count_cpu);
}

}  // namespace
}  // namespace hashengine::binding
