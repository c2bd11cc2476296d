// The k nearest of a query out of its candidates, in order.
//
// Idea. A block a query. The k-th smallest key is found digit by digit, from the most significant on: a histogram of
// the digit among the keys that share the digits before it. What is not beyond that key is gathered in shared memory
// and sorted there (bitonic). Keys are unique, so the result does not depend on the order in which candidates came.
//
// Where the sample that set the limit misled it, so that too few or too many candidates came, the same steps run over
// all codes: right, if slow (a query takes as long as some passes of one multiprocessor over the database). The limits
// are chosen so that this happens to less than one query in 100,000. For small databases it is the only step of all.
//
// Traffic. 8 bytes a candidate and digit, three digits for a million codes of 64 bits, from the caches: about 2,500
// candidates a query at k = 1,000. 12 bytes a result are written.
//
// Launch. 256 threads a block, 1024 where blocks are few. 32 KB of shared memory at the largest k.
//
// Limits. Fewer than 2^32 codes; k keys fit in shared memory.

#include "hamming_topk.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace hashengine {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kFewThreads = 256, kManyThreads = 1024;
constexpr uint64_t kNoKey = ~uint64_t{0};

// The keys that a query's candidates have.
struct CandidateKeys {
  const uint64_t* keys;
  int64_t count;

  __device__ __forceinline__ uint64_t operator()(int64_t i) const { return keys[i]; }
};

// The keys of all codes; kNoKey of those that may not be found.
struct DatabaseKeys {
  DeviceSearch search;
  Keys layout;
  int64_t query;
  int64_t count;

  __device__ __forceinline__ uint64_t operator()(int64_t i) const {
    return search.may_find(query, i) ? layout.key(search.distance(query, i), i) : kNoKey;
  }
};

struct SelectScratch {
  unsigned digits[kDigits];
  unsigned warp_sums[kWarpThreads];
  unsigned digit, before, here;  // the digit that was looked for, how many keys come before it, how many have it
  unsigned taken;
};

// Finds the digit at which the running sum reaches `rank` (from 1); where none does, here is 0. Each thread sums up as
// many digits as there are for it.
__device__ __forceinline__ void find_digit(SelectScratch& scratch, unsigned rank) {
  const unsigned lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const unsigned share = kDigits / blockDim.x;
  unsigned own = 0;
  for (unsigned i = 0; i < share; ++i) own += scratch.digits[threadIdx.x * share + i];
  unsigned sum = own;
#pragma unroll
  for (unsigned distance = 1; distance < kWarpThreads; distance *= 2) {
    const unsigned before = __shfl_up_sync(kWholeWarp, sum, distance);
    if (lane >= distance) sum += before;
  }
  if (lane == kWarpThreads - 1) scratch.warp_sums[warp] = sum;
  if (threadIdx.x == 0) scratch.here = 0;
  __syncthreads();
  for (unsigned i = 0; i < warp; ++i) sum += scratch.warp_sums[i];
  unsigned before = sum - own;
  if (before < rank && rank <= sum) {  // one thread's
    unsigned digit = threadIdx.x * share;
    while (before + scratch.digits[digit] < rank) before += scratch.digits[digit++];
    scratch.digit = digit;
    scratch.before = before;
    scratch.here = scratch.digits[digit];
  }
  __syncthreads();
}

// The key that `rank` keys are not beyond; kNoKey where there are not so many.
template <typename Source>
__device__ __forceinline__ uint64_t key_of_rank(const Source& source, unsigned rank, int key_bits,
                                                SelectScratch& scratch) {
  uint64_t prefix = 0;
  for (int shift = key_bits; shift > 0;) {
    const int bits = min(kDigitBits, shift);
    const uint64_t above = shift == key_bits ? 0 : prefix >> shift;
    const int above_shift = shift;
    shift -= bits;
    for (int i = threadIdx.x; i < kDigits; i += blockDim.x) scratch.digits[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < source.count; i += blockDim.x) {
      const uint64_t key = source(i);
      if (key >> above_shift == above) atomicAdd(&scratch.digits[key >> shift & ((1u << bits) - 1)], 1u);
    }
    __syncthreads();
    find_digit(scratch, rank);
    if (scratch.here == 0) return kNoKey - 1;  // fewer keys than the rank: all of them, but for codes left out
    prefix |= static_cast<uint64_t>(scratch.digit) << shift;
    rank -= scratch.before;
    if (scratch.here == rank) return prefix | ((uint64_t{1} << shift) - 1);  // all that begin like this
  }
  return prefix;
}

// Sorts `size` keys in shared memory, a power of two (Batcher's bitonic network).
__device__ __forceinline__ void sort_keys(uint64_t* keys, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const int low = 2 * i - (i & (distance - 1)), high = low + distance;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// The k nearest to `keys`, sorted; kNoKey where there are fewer.
template <typename Source>
__device__ __forceinline__ void select(const Source& source, int k, int size, int key_bits, uint64_t* keys,
                                       SelectScratch& scratch) {
  const uint64_t last = key_of_rank(source, static_cast<unsigned>(k), key_bits, scratch);
  for (int i = threadIdx.x; i < size; i += blockDim.x) keys[i] = kNoKey;
  if (threadIdx.x == 0) scratch.taken = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < source.count; i += blockDim.x) {
    const uint64_t key = source(i);
    if (key <= last) keys[atomicAdd(&scratch.taken, 1u)] = key;
  }
  sort_keys(keys, size);
}

__global__ void __launch_bounds__(kManyThreads, 1)
    select_kernel(DeviceSearch search, Candidates candidates, bool has_candidates, Keys layout, int k, int size,
                  int key_bits, int32_t* distances, int64_t* positions) {
  __shared__ SelectScratch scratch;
  auto* keys = dynamic_shared<uint64_t>();  // [size]
  wait_for_last_kernel();
  const int64_t query = blockIdx.x;
  int64_t count = -1;
  if (has_candidates) {
    const int64_t counted = candidates.counts[query];
    const bool is_everything = candidates.limits[query] == layout.key(search.bits(), search.codes.count - 1);
    if (counted <= candidates.capacity && (is_everything || counted >= k)) count = counted;
  }
  if (count >= 0)
    select(CandidateKeys{candidates.keys + query * candidates.capacity, count}, k, size, key_bits, keys, scratch);
  else
    select(DatabaseKeys{search, layout, query, search.codes.count}, k, size, key_bits, keys, scratch);
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    const bool is_found = keys[i] != kNoKey;
    distances[query * k + i] = is_found ? layout.distance(keys[i]) : search.bits() + 1;
    positions[query * k + i] = is_found ? layout.position(keys[i]) : -1;
  }
}

}  // namespace

void launch_hamming_select(const HammingSearch& search, const Candidates* candidates, Keys layout, int64_t k,
                           int32_t* distances, int64_t* positions, cudaStream_t stream) {
  const int size = 1 << bit_width(k - 1);
  const int key_bits = layout.position_bits + bit_width(8 * search.code_bytes);
  const bool is_few = search.query_count <= device_attribute(cudaDevAttrMultiProcessorCount);
  const LaunchShape shape{search.query_count, is_few ? kManyThreads : kFewThreads, size * int64_t{sizeof(uint64_t)}, 1,
                          true};
  launch(select_kernel, shape, stream, DeviceSearch(search), candidates != nullptr ? *candidates : Candidates{},
         candidates != nullptr, layout, static_cast<int>(k), size, key_bits, distances, positions);
}

}  // namespace hashengine
