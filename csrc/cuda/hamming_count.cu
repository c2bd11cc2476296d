// How many codes lie at each distance, on the GPU; and, with labels, how many relevant ones.
//
// Idea. A block measures its codes against up to eight queries, a word of a code serving all of them, and counts in
// shared memory: an increment by the constant 1 is one instruction, which adds up the lanes of a warp that name one
// counter. Its counts are then added to the result, one atomic a counter that is not zero; integers, so any order gives
// the same sums. With labels a distance has two counters, for codes that are relevant and for those that are not.
//
// Work, N codes of B bytes and Q queries. A population count per 4 bytes of a pair, 16 a clock and multiprocessor,
// which is the bound from about eight queries on; below, memory: NB bytes, the floor. More queries read NB once for
// each eight, mostly from the L2: blocks of the same codes are neighbours. The counts are 8 (8B + 1) bytes a query.
//
// Launch. 256 threads a block, codes in chunks of at least 4,096, longer where there are blocks enough. Counters that
// do not fit in shared memory, those of codes of more than 9,208 bits or 4,600 with labels, are the result's own, in
// global memory: there an increment costs little beside the distance.
//
// Limits. 2^31 blocks, and 2^31 codes a chunk.

#include <algorithm>

#include "hamming_measure.cuh"
#include "hashengine/hamming_cuda.h"
#include "launch.cuh"

namespace hashengine {
namespace {

constexpr int64_t kMinChunkCodes = 4096;
constexpr int64_t kMaxChunkCodes = int64_t{1} << 31;  // all may lie at one distance, whose counter has 32 bits
constexpr int64_t kEnoughBlocks = 1 << 13;            // several waves on any GPU

__device__ __forceinline__ bool is_relevant(const HammingLabels& labels, int64_t query, int64_t position) {
  for (int64_t i = 0; i < labels.words; ++i) {
    const uint64_t own = __ldg(labels.queries + query * labels.words + i);
    const uint64_t word = __ldg(labels.codes + position * labels.words + i);
    if (labels.any && (own & word) != 0) return true;
    if (!labels.any && own != word) return false;
  }
  return !labels.any;
}

// Without labels `relevant` is null.
template <int kQueries>
__global__ void __launch_bounds__(kCountThreads, kCountBlocks)
    count_kernel(DeviceSearch search, HammingLabels labels, int64_t query_groups, int64_t chunk_codes,
                 bool counts_in_shared, Count* counts, Count* relevant) {
  const int64_t chunk = blockIdx.x / query_groups;
  const int64_t first_query = (blockIdx.x - chunk * query_groups) * kQueries;
  const int64_t begin = chunk * chunk_codes, end = min(begin + chunk_codes, search.codes.count);
  const int bins = search.bits() + 1, kinds = relevant == nullptr ? 1 : 2;
  counts += first_query * bins;
  if (relevant != nullptr) relevant += first_query * bins;

  const QueryBlock<kQueries> queries(search, first_query, dynamic_shared<uint32_t>());
  if (!counts_in_shared) {
    __syncthreads();
    queries.for_each_distance(begin, end, [&](int q, int64_t position, int distance) {
      atomicAdd(counts + q * bins + distance, Count{1});
      if (relevant != nullptr && is_relevant(labels, first_query + q, position))
        atomicAdd(relevant + q * bins + distance, Count{1});
    });
    return;
  }
  // [query, distance, relevant or not]
  unsigned* const counters = dynamic_shared<unsigned>() + queries.bytes(search.codes.bytes) / sizeof(unsigned);
  for (int i = threadIdx.x; i < kQueries * bins * kinds; i += kCountThreads) counters[i] = 0;
  __syncthreads();
  queries.for_each_distance(begin, end, [&](int q, int64_t position, int distance) {
    const int kind = relevant != nullptr && is_relevant(labels, first_query + q, position);
    atomicAdd(counters + (q * bins + distance) * kinds + kind, 1u);
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kQueries * bins; i += kCountThreads) {  // beyond the last query all are zero
    const unsigned hits = kinds == 2 ? counters[2 * i + 1] : 0, all = counters[i * kinds] + hits;
    if (all != 0) atomicAdd(counts + i, Count{all});
    if (hits != 0) atomicAdd(relevant + i, Count{hits});
  }
}

}  // namespace

void launch_hamming_count(const HammingSearch& search, const HammingLabels* labels, int64_t* counts, int64_t* relevant,
                          cudaStream_t stream) {
  const int64_t bins = 8 * search.code_bytes + 1, result_bytes = search.query_count * bins * sizeof(Count);
  if (search.query_count == 0) return;
  cudaMemsetAsync(counts, 0, result_bytes, stream);
  if (labels) cudaMemsetAsync(relevant, 0, result_bytes, stream);
  if (search.code_count == 0) return;
  const int64_t counter_bytes = bins * (labels ? 2 : 1) * static_cast<int64_t>(sizeof(unsigned));
  with_queries_of_a_block(search.query_count, counter_bytes, [&](auto queries) {
    constexpr int kQueries = decltype(queries)::value;
    const int64_t groups = ceil_div<int64_t>(search.query_count, kQueries);
    const int64_t chunk_codes =
        std::clamp(ceil_div(search.code_count, ceil_div(kEnoughBlocks, groups)), kMinChunkCodes, kMaxChunkCodes);
    const bool in_shared = kQueries * counter_bytes <= kCounterBytes;
    const LaunchShape shape = {groups * ceil_div(search.code_count, chunk_codes), kCountThreads,
                               QueryBlock<kQueries>::bytes(search.code_bytes) + in_shared * kQueries * counter_bytes};
    launch(count_kernel<kQueries>, shape, stream, DeviceSearch(search), labels ? *labels : HammingLabels{}, groups,
           chunk_codes, in_shared, reinterpret_cast<Count*>(counts),
           labels ? reinterpret_cast<Count*>(relevant) : nullptr);
  });
}

}  // namespace hashengine
