#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <memory>
#include <tuple>

#include "check.h"
#include "hashengine/hamming.h"
#include "hashengine/huge_pages.h"

namespace hashengine::binding {
namespace {

SimdLevel simd_level() {
  try {
    return chosen_simd_level();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

ThreadPool thread_pool(const char* op, int64_t num_threads) {
  TORCH_CHECK_VALUE(num_threads >= 0, op, ": num_threads must be at least 1, or 0 for all, got ", num_threads);
  return torch_thread_pool(num_threads);
}

// Checked arguments, and the tensors that own their memory.
struct Arguments {
  at::Tensor queries;
  at::Tensor codes;
  at::Tensor filter;
  HammingSearch search;

  Arguments(const char* op, const at::Tensor& query_rows, const at::Tensor& code_rows,
            const std::optional<at::Tensor>& bitmap) {
    check_codes(query_rows, op, "queries");
    check_codes(code_rows, op, "codes");
    check_rows(op, "queries", query_rows);
    check_rows(op, "codes", code_rows);
    TORCH_CHECK_VALUE(query_rows.size(1) == code_rows.size(1), op, ": queries and codes must have the same width, got ",
                      8 * query_rows.size(1), " and ", 8 * code_rows.size(1), " bits");
    TORCH_CHECK_VALUE(query_rows.device() == code_rows.device(), op, ": queries and codes must be on one device, got ",
                      query_rows.device(), " and ", code_rows.device());
    queries = query_rows.contiguous();
    codes = code_rows.contiguous();
    search = {queries.const_data_ptr<uint8_t>(), codes.const_data_ptr<uint8_t>(), queries.size(0), codes.size(0),
              codes.size(1), nullptr, 0};
    if (!bitmap) return;
    check_filter(op, *bitmap);
    filter = bitmap->contiguous();
    search.filter = filter.const_data_ptr<uint8_t>();
    search.filter_stride = filter.dim() == 2 ? filter.size(1) : 0;
  }

  int64_t bins() const { return 8 * search.code_bytes + 1; }

 private:
  static void check_rows(const char* op, const char* name, const at::Tensor& rows) {
    TORCH_CHECK_VALUE(rows.dim() == 2 && 0 < rows.size(1) && rows.size(1) <= kHammingMaxBytes, op, ": ", name,
                      " must be [rows, bits / 8] of at most ", 8 * kHammingMaxBytes, " bits, got ", rows.sizes());
  }

  void check_filter(const char* op, const at::Tensor& bitmap) const {
    TORCH_CHECK_TYPE(bitmap.scalar_type() == at::kByte, op, ": filter must be a bitmap of uint8, got ",
                     bitmap.scalar_type(), "; pack a mask with pack_filter");
    const int64_t width = ceil_div<int64_t>(codes.size(0), 8);
    const bool fits = (bitmap.dim() == 1 || (bitmap.dim() == 2 && bitmap.size(0) == queries.size(0))) &&
                      bitmap.size(-1) == width;
    TORCH_CHECK_VALUE(fits, op, ": filter must be [", width, "], or [", queries.size(0), ", ", width,
                      "] with a row a query, for ", codes.size(0), " codes, got ", bitmap.sizes());
    TORCH_CHECK_VALUE(bitmap.device() == codes.device(), op, ": filter must be on the codes' device, ", codes.device(),
                      ", got ", bitmap.device(), "; move one");
  }
};

// Pages of megabytes are huge ones where the system has them: it clears them when they are first written, one by one.
at::Tensor empty_answers(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor answers = at::empty(sizes, at::TensorOptions(dtype));
  use_huge_pages(answers.mutable_data_ptr(), int64_t(answers.nbytes()));
  return answers;
}

std::tuple<at::Tensor, at::Tensor> topk_cpu(const at::Tensor& queries, const at::Tensor& codes, int64_t k,
                                            const std::optional<at::Tensor>& filter, int64_t num_threads) {
  const Arguments arguments("hamming_topk", queries, codes, filter);
  TORCH_CHECK_VALUE(1 <= k && k <= codes.size(0), "hamming_topk: k must be 1 to the number of codes (", codes.size(0),
                    "), got ", k);
  const at::Tensor distances = empty_answers({queries.size(0), k}, at::kInt);
  const at::Tensor positions = empty_answers({queries.size(0), k}, at::kLong);
  hamming_topk_cpu(arguments.search, k, distances.mutable_data_ptr<int32_t>(), positions.mutable_data_ptr<int64_t>(),
                   simd_level(), thread_pool("hamming_topk", num_threads));
  return {distances, positions};
}

// The tensor takes the values over.
template <typename T>
at::Tensor as_tensor(std::unique_ptr<T[]> values, int64_t count, at::ScalarType dtype) {
  T* const data = values.release();
  return at::from_blob(data, {count}, [data](void*) { delete[] data; }, at::TensorOptions(dtype));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> range_cpu(const at::Tensor& queries, const at::Tensor& codes,
                                                         int64_t radius, const std::optional<at::Tensor>& filter,
                                                         std::optional<int64_t> max_results, int64_t num_threads) {
  const Arguments arguments("hamming_range", queries, codes, filter);
  TORCH_CHECK_VALUE(0 <= radius && radius < arguments.bins(), "hamming_range: radius must be 0 to the number of bits (",
                    arguments.bins() - 1, "), got ", radius);
  TORCH_CHECK_VALUE(!max_results || *max_results >= 1, "hamming_range: max_results must be at least 1, got ",
                    max_results.value_or(0));
  const int64_t most = std::min(max_results.value_or(codes.size(0)), codes.size(0));
  HammingRangeResult result =
      hamming_range_cpu(arguments.search, radius, std::max<int64_t>(most, 1), simd_level(),
                        thread_pool("hamming_range", num_threads));
  const at::Tensor lims = at::empty({int64_t(result.lims.size())}, at::TensorOptions(at::kLong));
  std::copy(result.lims.begin(), result.lims.end(), lims.mutable_data_ptr<int64_t>());
  const int64_t count = result.count();
  return {lims, as_tensor(std::move(result.distances), count, at::kInt),
          as_tensor(std::move(result.positions), count, at::kLong)};
}

// Labels as rows of 64-bit words: one that is compared whole, or a bit a label.
std::vector<uint64_t> label_words(const at::Tensor& labels) {
  const at::Tensor rows = labels.contiguous();
  if (rows.dim() == 1) {
    const int64_t* from = rows.const_data_ptr<int64_t>();
    return {from, from + rows.numel()};
  }
  const int64_t columns = rows.size(1), words = ceil_div<int64_t>(columns, 64);
  std::vector<uint64_t> bits(size_t(rows.size(0) * words));
  const bool* from = rows.const_data_ptr<bool>();
  for (int64_t row = 0; row < rows.size(0); ++row)
    for (int64_t column = 0; column < columns; ++column)
      bits[size_t(row * words + column / 64)] |= uint64_t(from[row * columns + column]) << column % 64;
  return bits;
}

void check_labels(const char* name, const at::Tensor& labels, const at::Tensor& rows) {
  TORCH_CHECK_TYPE((labels.dim() == 1 && labels.scalar_type() == at::kLong) ||
                       (labels.dim() == 2 && labels.scalar_type() == at::kBool),
                   "hamming_count: ", name, " must be int64 [N] or bool [N, L], got ", labels.scalar_type(), " ",
                   labels.sizes());
  TORCH_CHECK_VALUE(labels.size(0) == rows.size(0) && labels.device() == rows.device(), "hamming_count: ", name,
                    " must be a row for each of ", rows.size(0), " on ", rows.device(), ", got ", labels.sizes(), " on ",
                    labels.device());
}

std::tuple<at::Tensor, at::Tensor> count_cpu(const at::Tensor& queries, const at::Tensor& codes,
                                             const std::optional<at::Tensor>& filter,
                                             const std::optional<at::Tensor>& query_labels,
                                             const std::optional<at::Tensor>& labels, int64_t num_threads) {
  const Arguments arguments("hamming_count", queries, codes, filter);
  TORCH_CHECK_VALUE(query_labels.has_value() == labels.has_value(),
                    "hamming_count: query_labels and labels must come together, got one of them");
  std::vector<uint64_t> query_words, code_words;
  HammingLabels words{};
  if (labels) {
    check_labels("query_labels", *query_labels, queries);
    check_labels("labels", *labels, codes);
    TORCH_CHECK_VALUE(query_labels->sizes().slice(1) == labels->sizes().slice(1),
                      "hamming_count: query_labels and labels must be of one kind and width, got ",
                      query_labels->sizes(), " and ", labels->sizes());
    query_words = label_words(*query_labels);
    code_words = label_words(*labels);
    const bool is_multi_hot = labels->dim() == 2;
    words = {query_words.data(), code_words.data(), is_multi_hot ? ceil_div<int64_t>(labels->size(1), 64) : 1,
             is_multi_hot};
  }
  at::Tensor counts = at::empty({queries.size(0), arguments.bins()}, queries.options().dtype(at::kLong));
  at::Tensor relevant = at::empty({queries.size(0), labels ? arguments.bins() : 0}, counts.options());
  hamming_count_cpu(arguments.search, labels ? &words : nullptr, counts.mutable_data_ptr<int64_t>(),
                    relevant.mutable_data_ptr<int64_t>(), simd_level(), thread_pool("hamming_count", num_threads));
  return {counts, relevant};
}

TORCH_LIBRARY_IMPL(hashengine, CPU, library) {
  library.impl("hamming_topk", topk_cpu);
  library.impl("hamming_range", range_cpu);
  library.impl("hamming_count", count_cpu);
}

}  // namespace
}  // namespace hashengine::binding
