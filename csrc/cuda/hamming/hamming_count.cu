// hamming_count on the GPU: the number of codes at each distance and, if labels are given, also the number of relevant
// codes at each distance.
//
// Idea. A block compares its codes with up to eight queries, so that one load of a word of a code serves all of them.
// It counts in shared memory. There, an atomicAdd of the constant 1 compiles to a single instruction, ATOMS.POPC.INC,
// which is assumed to combine the lanes of a warp that increment the same counter. The block then adds its nonzero
// counters to the result with atomics. All counts are integers, so the order of the additions does not matter. With
// labels, each distance has two counters: one for relevant codes and one for the others.
//
// Traffic, for N codes of B bytes. The floor is one read of the codes, N * B bytes. Each further group of eight queries
// reads the codes again, mostly from L2, because blocks with the same codes are adjacent. The result has
// 8 * (8B + 1) bytes per query, and twice as many with labels.
//
// Work. The distance between a query and a code needs B / 4 population counts. An SM computes 16 population counts per
// clock. Estimated for an H200 (132 SMs at 1.9 GHz, 4.8 TB/s): from about four queries on, the population counts take
// longer than one read of the codes.
//
// Launch. 256 threads per block. Each block has one segment of the codes and up to eight queries. Segments have 4,096
// codes, or more if the grid would otherwise exceed about kEnoughBlocks blocks. If the counters do not fit in shared
// memory (codes of more than 9,208 bits, or of more than 4,600 bits with labels), the kernel increments the result in
// global memory instead. For such long codes, an increment is assumed to take little time compared with the distance.
//
// Limits. A grid has at most 2^31 - 1 blocks, and a segment at most 2^31 codes.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/hamming/distances.cuh"
#include "hashengine/hamming_cuda.h"

namespace hashengine {
namespace {

constexpr int64_t kMinSegmentCodes = 4096;
constexpr int64_t kMaxSegmentCodes = int64_t{1} << 31;  // a 32-bit counter can count all codes of a segment
constexpr int64_t kEnoughBlocks = 1 << 13;              // several times as many as a current GPU runs at a time

__device__ __forceinline__ bool is_relevant(const HammingLabels& labels, int64_t query, int64_t position) {
  for (int64_t i = 0; i < labels.words; ++i) {
    const uint64_t query_word = __ldg(labels.queries + query * labels.words + i);
    const uint64_t code_word = __ldg(labels.codes + position * labels.words + i);
    if (labels.any && (query_word & code_word) != 0) return true;
    if (!labels.any && query_word != code_word) return false;
  }
  return !labels.any;
}

// `relevant` is null if there are no labels.
template <int kQueries>
__global__ void __launch_bounds__(kCountThreads, kCountBlocksPerSm)
    count_kernel(DeviceSearch search, HammingLabels labels, int64_t query_groups, int64_t segment_codes,
                 bool counts_in_shared, Count* counts, Count* relevant) {
  const int64_t segment = blockIdx.x / query_groups;
  const int64_t first_query = (blockIdx.x - segment * query_groups) * kQueries;
  const int64_t begin = segment * segment_codes, end = min(begin + segment_codes, search.codes.count);
  const int bins = search.bits() + 1, counters_per_bin = relevant == nullptr ? 1 : 2;
  counts += first_query * bins;
  if (relevant != nullptr) relevant += first_query * bins;

  const StagedQueries<kQueries> queries(search, first_query, dynamic_shared<uint32_t>());
  if (!counts_in_shared) {
    __syncthreads();
    queries.for_each_distance(begin, end, [&](int q, int64_t position, int distance) {
      atomicAdd(counts + q * bins + distance, Count{1});
      if (relevant != nullptr && is_relevant(labels, first_query + q, position))
        atomicAdd(relevant + q * bins + distance, Count{1});
    });
    return;
  }
  // [query][distance][is relevant]
  unsigned* const counters = dynamic_shared<unsigned>() + queries.bytes(search.codes.bytes) / sizeof(unsigned);
  for (int i = threadIdx.x; i < kQueries * bins * counters_per_bin; i += kCountThreads) counters[i] = 0;
  __syncthreads();
  queries.for_each_distance(begin, end, [&](int q, int64_t position, int distance) {
    const int counter = relevant != nullptr && is_relevant(labels, first_query + q, position);
    atomicAdd(counters + (q * bins + distance) * counters_per_bin + counter, 1u);
  });
  __syncthreads();
  // If the block has fewer than kQueries queries, the other counters are zero.
  for (int i = threadIdx.x; i < kQueries * bins; i += kCountThreads) {
    const unsigned relevant_codes = counters_per_bin == 2 ? counters[2 * i + 1] : 0;
    const unsigned all_codes = counters[i * counters_per_bin] + relevant_codes;
    if (all_codes != 0) atomicAdd(counts + i, Count{all_codes});
    if (relevant_codes != 0) atomicAdd(relevant + i, Count{relevant_codes});
  }
}

}  // namespace

void launch_hamming_count(const HammingSearch& search, const HammingLabels* labels, int64_t* counts, int64_t* relevant,
                          cudaStream_t stream) {
  const int64_t bins = search.distance_count(), result_bytes = search.query_count * bins * sizeof(Count);
  if (search.query_count == 0) return;
  cudaMemsetAsync(counts, 0, result_bytes, stream);
  if (labels) cudaMemsetAsync(relevant, 0, result_bytes, stream);
  if (search.code_count == 0) return;
  const int64_t counter_bytes = bins * (labels ? 2 : 1) * static_cast<int64_t>(sizeof(unsigned));
  with_queries_per_block(search.query_count, counter_bytes, [&](auto queries) {
    constexpr int kQueries = decltype(queries)::value;
    const int64_t groups = ceil_div<int64_t>(search.query_count, kQueries);
    const int64_t segment_codes =
        std::clamp(ceil_div(search.code_count, ceil_div(kEnoughBlocks, groups)), kMinSegmentCodes, kMaxSegmentCodes);
    const bool in_shared = kQueries * counter_bytes <= kMaxCounterBytes;
    const LaunchShape shape = {
        groups * ceil_div(search.code_count, segment_codes), kCountThreads,
        StagedQueries<kQueries>::bytes(search.code_bytes) + in_shared * kQueries * counter_bytes};
    launch(count_kernel<kQueries>, shape, stream, DeviceSearch(search), labels ? *labels : HammingLabels{}, groups,
           segment_codes, in_shared, reinterpret_cast<Count*>(counts),
           labels ? reinterpret_cast<Count*>(relevant) : nullptr);
  });
}

}  // namespace hashengine
