#include "hashengine/hamming_cuda.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/zeros.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <tuple>

#include "binding/cuda.h"
#include "binding/hamming.h"
#include "hashengine/pack_bits.h"

namespace hashengine::binding {
namespace {

// Checks that the kernels can run on the device of the codes. While this object exists, that device is the current one.
class HammingDevice {
 public:
  HammingDevice(const char* op, const HammingArguments& arguments) : guard_(arguments.codes.device()) {
    const int index = arguments.codes.device().index();
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    TORCH_CHECK_VALUE(major >= 8, op, ": device must be a GPU of compute capability 8.0 or more, got ", major, ".",
                      minor, "; use 'cpu'");
  }

 private:
  c10::cuda::CUDAGuard guard_;
};

// A ranking of all queries, in batches that share one workspace.
class BatchedRanking {
 public:
  BatchedRanking(const HammingArguments& arguments, int64_t radius, int64_t max_results)
      : search_(arguments.search),
        radius_(radius),
        max_results_(max_results),
        batch_size_(std::min(hamming_ranking_batch(slice(0, search_.query_count)), search_.query_count)),
        workspace_(arguments.empty({hamming_ranking_workspace_bytes(slice(0, search_.query_count))}, at::kByte)) {}

  bool is_one_batch() const { return batch_size_ == search_.query_count; }

  // Calls visit(batch, first) for each batch; `first` is the index of the batch's first query.
  template <typename Visit>
  void for_each_batch(Visit visit) const {
    for (int64_t first = 0; first < search_.query_count; first += batch_size_) visit(slice(first, batch_size_), first);
  }

  // Counts the results of the batch. Writes the number of results of each query to `totals`, unless it is null.
  void count(const HammingRanking& batch, int64_t* totals) const {
    launch_hamming_ranking_count(batch, totals, workspace_.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Writes the results of the batch, which must be the last batch that was counted.
  void place(const HammingRanking& batch, const int64_t* lims, int32_t* distances, int64_t* positions) const {
    launch_hamming_ranking_place(batch, lims, distances, positions, workspace_.mutable_data_ptr(),
                                 c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  HammingRanking slice(int64_t first, int64_t count) const {
    return {search_.slice(first, count), radius_, max_results_};
  }

  HammingSearch search_;
  int64_t radius_;
  int64_t max_results_;
  int64_t batch_size_;
  at::Tensor workspace_;
};

std::tuple<at::Tensor, at::Tensor> topk_cuda(const at::Tensor& queries, const at::Tensor& codes, int64_t k,
                                             const std::optional<at::Tensor>& filter, int64_t num_threads) {
  const HammingArguments arguments("hamming_topk", queries, codes, filter, num_threads);
  const HammingSearch& search = arguments.search;
  check_k(search, k);
  const HammingDevice device("hamming_topk", arguments);
  const at::Tensor distances = arguments.empty({search.query_count, k}, at::kInt);
  const at::Tensor positions = arguments.empty({search.query_count, k}, at::kLong);
  auto* const to_distances = distances.mutable_data_ptr<int32_t>();
  auto* const to_positions = positions.mutable_data_ptr<int64_t>();
  if (search.query_count == 0) return {distances, positions};
  if (can_launch_hamming_topk(search, k)) {
    const at::Tensor workspace = arguments.empty({hamming_topk_workspace_bytes(search, k)}, at::kByte);
    launch_hamming_topk(search, k, to_distances, to_positions, workspace.mutable_data_ptr(),
                        c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {distances, positions};
  }
  const BatchedRanking ranking(arguments, search.distance_count() - 1, k);
  ranking.for_each_batch([&](const HammingRanking& batch, int64_t first) {
    ranking.count(batch, nullptr);
    ranking.place(batch, nullptr, to_distances + first * k, to_positions + first * k);
  });
  return {distances, positions};
}

// Synchronizes once, to read the number of results.
std::tuple<at::Tensor, at::Tensor, at::Tensor> range_cuda(const at::Tensor& queries, const at::Tensor& codes,
                                                          int64_t radius, const std::optional<at::Tensor>& filter,
                                                          std::optional<int64_t> max_results, int64_t num_threads) {
  const HammingArguments arguments("hamming_range", queries, codes, filter, num_threads);
  const int64_t limit = check_range_limits(arguments.search, radius, max_results);
  const int64_t query_count = arguments.search.query_count;
  const HammingDevice device("hamming_range", arguments);
  at::Tensor lims = at::zeros({query_count + 1}, arguments.codes.options().dtype(at::kLong));
  if (query_count == 0) return {lims, arguments.empty({0}, at::kInt), arguments.empty({0}, at::kLong)};

  const BatchedRanking ranking(arguments, radius, limit);
  const at::Tensor totals = arguments.empty({query_count}, at::kLong);
  ranking.for_each_batch([&](const HammingRanking& batch, int64_t first) {
    ranking.count(batch, totals.mutable_data_ptr<int64_t>() + first);
  });
  at::Tensor ends = lims.slice(0, 1);
  at::cumsum_out(ends, totals, 0);
  const int64_t count = lims[query_count].item<int64_t>();

  const at::Tensor distances = arguments.empty({count}, at::kInt), positions = arguments.empty({count}, at::kLong);
  ranking.for_each_batch([&](const HammingRanking& batch, int64_t first) {
    if (!ranking.is_one_batch()) ranking.count(batch, nullptr);  // the workspace has the counts of another batch
    ranking.place(batch, lims.const_data_ptr<int64_t>() + first, distances.mutable_data_ptr<int32_t>(),
                  positions.mutable_data_ptr<int64_t>());
  });
  return {lims, distances, positions};
}

// Converts labels to rows of 64-bit words: an integer label to one word, a multi-hot row to one bit per label. The
// order of the bits in a row does not matter, so the kernel of pack_bits can pack them.
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
                                              const std::optional<at::Tensor>& code_labels, int64_t num_threads) {
  const HammingArguments arguments("hamming_count", queries, codes, filter, num_threads);
  check_labels(arguments, query_labels, code_labels);
  const HammingDevice device("hamming_count", arguments);
  at::Tensor query_words, code_words;
  HammingLabels labels{};
  if (code_labels) {
    query_words = label_words(*query_labels);
    code_words = label_words(*code_labels);
    labels = {static_cast<const uint64_t*>(query_words.const_data_ptr()),
              static_cast<const uint64_t*>(code_words.const_data_ptr()), label_word_count(*code_labels),
              code_labels->dim() == 2};
  }
  auto [counts, relevant] = empty_counts(arguments, code_labels.has_value());
  launch_hamming_count(arguments.search, code_labels ? &labels : nullptr, counts.mutable_data_ptr<int64_t>(),
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
