// The checks of the Hamming ops that every device shares.
#pragma once

#include <ATen/ops/empty.h>

#include <optional>
#include <utility>

#include "check.h"
#include "hashengine/hamming.h"

namespace hashengine::binding {

// Checked arguments of every Hamming op, and the tensors that own their memory.
struct HammingArguments {
  at::Tensor queries;
  at::Tensor codes;
  at::Tensor filter;
  HammingSearch search;

  HammingArguments(const char* op, const at::Tensor& query_rows, const at::Tensor& code_rows,
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
    search = {queries.const_data_ptr<uint8_t>(),
              codes.const_data_ptr<uint8_t>(),
              queries.size(0),
              codes.size(0),
              codes.size(1),
              nullptr,
              0};
    if (!bitmap) return;
    check_filter(op, *bitmap);
    filter = bitmap->contiguous();
    search.filter = filter.const_data_ptr<uint8_t>();
    search.filter_stride = filter.dim() == 2 ? filter.size(1) : 0;
  }

  int64_t bins() const { return 8 * search.code_bytes + 1; }

  // A tensor on the codes' device, not initialised.
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::empty(sizes, codes.options().dtype(dtype));
  }

 private:
  static void check_rows(const char* op, const char* name, const at::Tensor& rows) {
    TORCH_CHECK_VALUE(rows.dim() == 2 && 0 < rows.size(1) && rows.size(1) <= kHammingMaxBytes, op, ": ", name,
                      " must be [rows, bits / 8] of at most ", 8 * kHammingMaxBytes, " bits, got ", rows.sizes());
  }

  void check_filter(const char* op, const at::Tensor& bitmap) const {
    TORCH_CHECK_TYPE(bitmap.scalar_type() == at::kByte, op, ": filter must be a bitmap of uint8, got ",
                     bitmap.scalar_type(), "; pack a mask with pack_filter");
    const int64_t width = ceil_div<int64_t>(codes.size(0), 8);
    const bool fits =
        (bitmap.dim() == 1 || (bitmap.dim() == 2 && bitmap.size(0) == queries.size(0))) && bitmap.size(-1) == width;
    TORCH_CHECK_VALUE(fits, op, ": filter must be [", width, "], or [", queries.size(0), ", ", width,
                      "] with a row a query, for ", codes.size(0), " codes, got ", bitmap.sizes());
    TORCH_CHECK_VALUE(bitmap.device() == codes.device(), op, ": filter must be on the codes' device, ", codes.device(),
                      ", got ", bitmap.device(), "; move one");
  }
};

inline void check_num_threads(const char* op, int64_t num_threads) {
  TORCH_CHECK_VALUE(num_threads >= 0, op, ": num_threads must be at least 1, or 0 for all, got ", num_threads);
}

inline void check_k(const HammingArguments& arguments, int64_t k) {
  TORCH_CHECK_VALUE(1 <= k && k <= arguments.search.code_count, "hamming_topk: k must be 1 to the number of codes (",
                    arguments.search.code_count, "), got ", k);
}

// Checks the radius; returns how many results a query has at most.
inline int64_t most_results(const HammingArguments& arguments, int64_t radius, std::optional<int64_t> max_results) {
  TORCH_CHECK_VALUE(0 <= radius && radius < arguments.bins(), "hamming_range: radius must be 0 to the number of bits (",
                    arguments.bins() - 1, "), got ", radius);
  TORCH_CHECK_VALUE(!max_results || *max_results >= 1, "hamming_range: max_results must be at least 1, got ",
                    max_results.value_or(0));
  const int64_t codes = arguments.search.code_count;
  return std::min(max_results.value_or(codes), codes);
}

inline void check_labels(const HammingArguments& arguments, const std::optional<at::Tensor>& query_labels,
                         const std::optional<at::Tensor>& labels) {
  TORCH_CHECK_VALUE(query_labels.has_value() == labels.has_value(),
                    "hamming_count: query_labels and labels must come together, got one of them");
  if (!labels) return;
  const auto check = [](const char* name, const at::Tensor& rows, const at::Tensor& of) {
    TORCH_CHECK_TYPE(
        (rows.dim() == 1 && rows.scalar_type() == at::kLong) || (rows.dim() == 2 && rows.scalar_type() == at::kBool),
        "hamming_count: ", name, " must be int64 [N] or bool [N, L], got ", rows.scalar_type(), " ", rows.sizes());
    TORCH_CHECK_VALUE(rows.size(0) == of.size(0) && rows.device() == of.device(), "hamming_count: ", name,
                      " must be a row for each of ", of.size(0), " on ", of.device(), ", got ", rows.sizes(), " on ",
                      rows.device());
  };
  check("query_labels", *query_labels, arguments.queries);
  check("labels", *labels, arguments.codes);
  TORCH_CHECK_VALUE(query_labels->sizes().slice(1) == labels->sizes().slice(1),
                    "hamming_count: query_labels and labels must be of one kind and width, got ", query_labels->sizes(),
                    " and ", labels->sizes());
}

// Of a row of labels: the label itself, or a bit for each.
inline int64_t label_word_count(const at::Tensor& labels) {
  return labels.dim() == 2 ? ceil_div<int64_t>(labels.size(1), 64) : 1;
}

// counts, and relevant, empty without labels; not initialised.
inline std::pair<at::Tensor, at::Tensor> empty_counts(const HammingArguments& arguments, bool has_labels) {
  const int64_t queries = arguments.search.query_count, bins = arguments.bins();
  return {arguments.empty({queries, bins}, at::kLong), arguments.empty({queries, has_labels ? bins : 0}, at::kLong)};
}

}  // namespace hashengine::binding
