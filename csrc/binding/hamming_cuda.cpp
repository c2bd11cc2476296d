#include "hashengine/hamming_cuda.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <tuple>

#include "hamming.h"
#include "hashengine/pack_bits.h"

namespace hashengine::binding {
namespace {

// The codes' device as the current one, while this lives.
class HammingDevice {
 public:
  HammingDevice(const char* op, const HammingArguments& arguments, int64_t num_threads)
      : guard_(arguments.codes.device()) {
    check_num_threads(op, num_threads);
    const int index = arguments.codes.device().index();
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    TORCH_CHECK(major >= 8, op, ": the GPU must be of compute capability 8.0 or later, got ", major, ".", minor);
  }

 private:
  c10::cuda::CUDAGuard guard_;
};

HammingSearch of_queries(const HammingSearch& search, int64_t first, int64_t count) {
  HammingSearch part = search;
  part.queries += first * search.code_bytes;
  part.query_count = count;
  if (part.filter) part.filter += first * search.filter_stride;
  return part;
}

// A ranking of many queries, in batches whose counts share one workspace.
class BatchedRanking {
 public:
  BatchedRanking(const HammingArguments& arguments, int64_t radius, int64_t most)
      : all_{arguments.search, radius, most}, batch_(std::min(hamming_ranking_batch(all_), all_.search.query_count)) {
    const HammingRanking largest = {of_queries(all_.search, 0, batch_), radius, most};
    workspace_ = arguments.empty({hamming_ranking_workspace_bytes(largest)}, at::kByte);
  }

  bool is_one_batch() const { return batch_ == all_.search.query_count; }

  // visit(ranking of a batch, its first query)
  template <typename Visit>
  void for_each_batch(Visit visit) const {
    for (int64_t first = 0; first < all_.search.query_count; first += batch_) {
      const int64_t count = std::min(batch_, all_.search.query_count - first);
      visit(HammingRanking{of_queries(all_.search, first, count), all_.radius, all_.most}, first);
    }
  }

  // totals: of the batch's queries, or null.
  void count(const HammingRanking& batch, int64_t* totals) const {
    launch_hamming_ranking_count(batch, totals, workspace_.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Of the batch that was counted last.
  void place(const HammingRanking& batch, const int64_t* lims, int32_t* distances, int64_t* positions) const {
    launch_hamming_ranking_place(batch, lims, distances, positions, workspace_.mutable_data_ptr(),
                                 c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  HammingRanking all_;
  int64_t batch_;
  at::Tensor workspace_;
};

std::tuple<at::Tensor, at::Tensor> topk_cuda(const at::Tensor& queries, const at::Tensor& codes, int64_t k,
                                             const std::optional<at::Tensor>& filter, int64_t num_threads) {
  const HammingArguments arguments("hamming_topk", queries, codes, filter);
  check_k(arguments, k);
  const HammingDevice device("hamming_topk", arguments, num_threads);
  const HammingSearch& search = arguments.search;
  const at::Tensor distances = arguments.empty({search.query_count, k}, at::kInt);
  const at::Tensor positions = arguments.empty({search.query_count, k}, at::kLong);
  auto* const to_distances = distances.mutable_data_ptr<int32_t>();
  auto* const to_positions = positions.mutable_data_ptr<int64_t>();
  if (search.query_count == 0) return {distances, positions};
  if (is_hamming_selected(search, k)) {
    const at::Tensor workspace = arguments.empty({hamming_topk_workspace_bytes(search, k)}, at::kByte);
    launch_hamming_topk(search, k, to_distances, to_positions, workspace.mutable_data_ptr(),
                        c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {distances, positions};
  }
  const BatchedRanking ranking(arguments, arguments.bins() - 1, k);
  ranking.for_each_batch([&](const HammingRanking& batch, int64_t first) {
    ranking.count(batch, nullptr);
    ranking.place(batch, nullptr, to_distances + first * k, to_positions + first * k);
  });
  return {distances, positions};
}

// Waits for the device once, to learn how many results there are.
std::tuple<at::Tensor, at::Tensor, at::Tensor> range_cuda(const at::Tensor& queries, const at::Tensor& codes,
                                                          int64_t radius, const std::optional<at::Tensor>& filter,
                                                          std::optional<int64_t> max_results, int64_t num_threads) {
  const HammingArguments arguments("hamming_range", queries, codes, filter);
  const int64_t most = most_results(arguments, radius, max_results), query_count = arguments.search.query_count;
  const HammingDevice device("hamming_range", arguments, num_threads);
  at::Tensor lims = at::zeros({query_count + 1}, arguments.codes.options().dtype(at::kLong));
  if (query_count == 0) return {lims, arguments.empty({0}, at::kInt), arguments.empty({0}, at::kLong)};

  const BatchedRanking ranking(arguments, radius, most);
  const at::Tensor totals = arguments.empty({query_count}, at::kLong);
  ranking.for_each_batch([&](const HammingRanking& batch, int64_t first) {
    ranking.count(batch, totals.mutable_data_ptr<int64_t>() + first);
  });
  at::Tensor ends = lims.slice(0, 1);
  at::cumsum_out(ends, totals, 0);
  const int64_t count = lims[query_count].item<int64_t>();

  const at::Tensor distances = arguments.empty({count}, at::kInt), positions = arguments.empty({count}, at::kLong);
  ranking.for_each_batch([&](const HammingRanking& batch, int64_t first) {
    if (!ranking.is_one_batch()) ranking.count(batch, nullptr);  // the workspace holds another batch's counts
    ranking.place(batch, lims.const_data_ptr<int64_t>() + first, distances.mutable_data_ptr<int32_t>(),
                  positions.mutable_data_ptr<int64_t>());
  });
  return {lims, distances, positions};
}

// Labels as rows of 64-bit words: one that is compared whole, or a bit a label, in any order.
at::Tensor label_words(const at::Tensor& labels) {
  if (labels.dim() == 1) return labels.contiguous();
  const int64_t words = label_word_count(labels);
  const at::Tensor bits = at::constant_pad_nd(labels, {0, 64 * words - labels.size(1)}).contiguous();
  at::Tensor packed = at::empty({labels.size(0), words}, labels.options().dtype(at::kLong));
  launch_pack_bits({bits.const_data_ptr(), static_cast<uint8_t*>(packed.mutable_data_ptr()),
                    static_cast<int64_t>(packed.nbytes()), Dtype::kBool},
                   c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return packed;
}

std::tuple<at::Tensor, at::Tensor> count_cuda(const at::Tensor& queries, const at::Tensor& codes,
                                              const std::optional<at::Tensor>& filter,
                                              const std::optional<at::Tensor>& query_labels,
                                              const std::optional<at::Tensor>& labels, int64_t num_threads) {
  const HammingArguments arguments("hamming_count", queries, codes, filter);
  check_labels(arguments, query_labels, labels);
  const HammingDevice device("hamming_count", arguments, num_threads);
  at::Tensor query_words, code_words;
  HammingLabels words{};
  if (labels) {
    query_words = label_words(*query_labels);
    code_words = label_words(*labels);
    words = {static_cast<const uint64_t*>(query_words.const_data_ptr()),
             static_cast<const uint64_t*>(code_words.const_data_ptr()), label_word_count(*labels), labels->dim() == 2};
  }
  auto [counts, relevant] = empty_counts(arguments, labels.has_value());
  launch_hamming_count(arguments.search, labels ? &words : nullptr, counts.mutable_data_ptr<int64_t>(),
                       relevant.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {counts, relevant};
}

TORCH_LIBRARY_IMPL(hashengine, CUDA, library) {
  library.impl("hamming_topk", topk_cuda);
  library.impl("hamming_range", range_cuda);
  library.impl("hamming_count", count_cuda);
}

}  // namespace
}  // namespace hashengine::binding
