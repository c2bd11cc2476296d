// hamming_topk, hamming_range and hamming_count: the checks and allocations that all devices share.
//
// The three ops share one binding file per device, because they have most of their arguments in common
// (HammingArguments). On the GPU, top-k and range also use the same ranking (BatchedRanking in hamming_cuda.cpp).
// Separate files would slow the build down: each file that includes torch's headers takes long to compile.
#pragma once

#include <ATen/ops/empty.h>

#include <optional>
#include <utility>

#include "binding/check.h"
#include "hashengine/hamming.h"

namespace hashengine::binding {

// The checked arguments that all Hamming ops share. This struct owns the memory that `search` points to.
struct HammingArguments {
  at::Tensor queries;
  at::Tensor codes;
  at::Tensor filter;
  HammingSearch search;

  HammingArguments(const char* op, const at::Tensor& query_rows, const at::Tensor& code_rows,
                   const std::optional<at::Tensor>& bitmap, int64_t num_threads) {
    check_rows(op, "queries", query_rows);
    check_rows(op, "codes", code_rows);
    TORCH_CHECK_VALUE(query_rows.size(1) == code_rows.size(1), op,
                      ": queries and codes must be of the same width, got ", 8 * query_rows.size(1), " and ",
                      8 * code_rows.size(1), " bits");
    TORCH_CHECK_VALUE(query_rows.device() == code_rows.device(), op, ": queries and codes must be on one device, got ",
                      query_rows.device(), " and ", code_rows.device());
    if (bitmap) check_bitmap(op, *bitmap, query_rows, code_rows);
    TORCH_CHECK_VALUE(num_threads >= 0, op, ": num_threads must be at least 1, or 0 for all, got ", num_threads);
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
    filter = bitmap->contiguous();
    search.filter = filter.const_data_ptr<uint8_t>();
    search.filter_stride = filter.dim() == 2 ? filter.size(1) : 0;
  }

  // An uninitialised tensor on the device of the codes.
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::empty(sizes, codes.options().dtype(dtype));
  }

 private:
  static void check_rows(const char* op, const char* name, const at::Tensor& rows) {
    check_uint8(op, name, rows);
    TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) > 0, op, ": ", name, " must be [rows, bits / 8], got ",
                      rows.sizes());
    TORCH_CHECK_VALUE(rows.size(1) <= kHammingMaxBytes, op, ": ", name, " must be of at most ", 8 * kHammingMaxBytes,
                      " bits, got ", 8 * rows.size(1));
  }

  static void check_bitmap(const char* op, const at::Tensor& bitmap, const at::Tensor& queries,
                           const at::Tensor& codes) {
    TORCH_CHECK_VALUE(bitmap.scalar_type() == at::kByte, op, ": filter must be a bitmap of uint8, got ",
                      dtype_name(bitmap), "; pack a mask with hashengine.ops.pack_filter first");
    const int64_t width = ceil_div<int64_t>(codes.size(0), 8);
    const bool is_shared = bitmap.dim() == 1, is_per_query = bitmap.dim() == 2 && bitmap.size(0) == queries.size(0);
    TORCH_CHECK_VALUE((is_shared || is_per_query) && bitmap.size(-1) == width, op, ": filter must be [", width,
                      "], or [", queries.size(0), ", ", width, "] with one row per query, for ", codes.size(0),
                      " codes, got ", bitmap.sizes());
    TORCH_CHECK_VALUE(bitmap.device() == codes.device(), op, ": filter must be on the device of codes, ",
                      codes.device(), ", got ", bitmap.device(), "; move one of them");
  }
};

inline void check_k(const HammingSearch& search, int64_t k) {
  TORCH_CHECK_VALUE(1 <= k && k <= search.code_count, "hamming_topk: k must be 1 to the number of codes (",
                    search.code_count, "), got ", k);
}

// Checks radius and max_results. Returns the largest number of results that one query can have.
inline int64_t check_range_limits(const HammingSearch& search, int64_t radius, std::optional<int64_t> max_results) {
  const int64_t bits = search.distance_count() - 1;
  TORCH_CHECK_VALUE(0 <= radius && radius <= bits, "hamming_range: radius must be 0 to the number of bits (", bits,
                    "), got ", radius);
  TORCH_CHECK_VALUE(!max_results || *max_results >= 1, "hamming_range: max_results must be at least 1, got ",
                    *max_results);
  return std::min(max_results.value_or(search.code_count), search.code_count);
}

// Checks that query_labels and code_labels are either both given or both missing, and that they are of one kind: int64
// [rows], or multi-hot bool [rows, number of labels].
inline void check_labels(const HammingArguments& arguments, const std::optional<at::Tensor>& query_labels,
                         const std::optional<at::Tensor>& code_labels) {
  TORCH_CHECK_VALUE(query_labels.has_value() == code_labels.has_value(),
                    "hamming_count: query_labels and code_labels must be given both or neither, got one of them");
  if (!code_labels) return;
  const auto check = [](const char* name, const at::Tensor& labels, const at::Tensor& rows) {
    // One column may hold classes, and 0 would then be no label but the absence of one.
    TORCH_CHECK_VALUE(labels.dim() != 2 || labels.size(1) >= 2, "hamming_count: ", name, " must be [", labels.size(0),
                      "], or multi-hot with at least 2 columns, got ", labels.sizes(), "; pass ", name,
                      "[:, 0] for classes, and add a column of zeros to multi-hot labels");
    const bool is_integer = labels.dim() == 1 && labels.scalar_type() == at::kLong;
    const bool is_multi_hot = labels.dim() == 2 && labels.scalar_type() == at::kBool;
    TORCH_CHECK_VALUE(
        (is_integer || is_multi_hot) && labels.size(0) == rows.size(0) && labels.device() == rows.device(),
        "hamming_count: ", name, " must be int64 [", rows.size(0), "] or bool [", rows.size(0), ", L] on ",
        rows.device(), ", got ", dtype_name(labels), " ", labels.sizes(), " on ", labels.device());
  };
  check("query_labels", *query_labels, arguments.queries);
  check("code_labels", *code_labels, arguments.codes);
  TORCH_CHECK_VALUE(query_labels->sizes().slice(1) == code_labels->sizes().slice(1),
                    "hamming_count: query_labels and code_labels must be of one kind and width, got ",
                    query_labels->sizes(), " and ", code_labels->sizes());
}

// The number of 64-bit words per row of labels: an integer label takes one word; a multi-hot row takes one bit per
// label, rounded up to whole words.
inline int64_t label_word_count(const at::Tensor& labels) {
  return labels.dim() == 2 ? ceil_div<int64_t>(labels.size(1), 64) : 1;
}

// The uninitialised results of hamming_count: `counts` and `relevant`. Without labels, `relevant` is [queries, 0].
inline std::pair<at::Tensor, at::Tensor> empty_counts(const HammingArguments& arguments, bool has_labels) {
  const int64_t queries = arguments.search.query_count, distances = arguments.search.distance_count();
  return {arguments.empty({queries, distances}, at::kLong),
          arguments.empty({queries, has_labels ? distances : 0}, at::kLong)};
}

}  // namespace hashengine::binding
