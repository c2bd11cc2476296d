// Selects each query's k nearest codes from its candidates, and orders them by (distance, position).
//
// Idea. One block per query. It finds the k-th smallest key by radix selection: digit by digit, the most significant
// digit first. For each digit, a histogram counts the keys that begin with the digits found so far. The block then
// gathers the keys up to the k-th one and sorts them in shared memory (bitonic sort). Keys are unique, so the order of
// the candidates does not matter.
//
// Fallback. If a query has too few candidates (fewer than k, although its bound excludes codes) or more than the
// capacity, the same steps run over all codes. That is exact but slow, because one SM reads the database several times
// for the query. Bounds and capacities are chosen so that fewer than one query in 100,000 has too few candidates, and
// fewer than one in 100,000 has too many. For a small database there are no candidates, and the same steps run over all
// codes.
//
// Traffic. Each digit takes one pass over the keys, and so does the gathering; a pass reads 8 bytes per candidate from
// the caches. With more queries than SMs, k = 1,000 and a million codes of 64 bits, about 2,400 codes are within a
// query's bound, and keys have three digits. Each result adds 12 bytes.
//
// Launch. 256 threads per block, or 1,024 if there are at most as many queries as SMs. With the largest k, the keys
// take 32 KB of shared memory.
//
// Limits. Fewer than 2^32 codes; k is at most 4,096 (hamming_topk.cu).

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/hamming/topk_steps.h"

namespace hashengine {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigitValues = 1 << kDigitBits;
constexpr int kThreads = 256, kThreadsOfFewBlocks = 1024;  // per block
constexpr uint64_t kNoKey = ~uint64_t{0};                  // larger than every key

// The keys of a query's candidates.
struct CandidateKeys {
  const uint64_t* keys;
  int64_t count;

  __device__ __forceinline__ uint64_t operator()(int64_t i) const { return keys[i]; }
};

// The keys of all codes; kNoKey for codes that the filter excludes.
struct DatabaseKeys {
  DeviceSearch search;
  DeviceKeyFormat format;
  int64_t query;
  int64_t count;

  __device__ __forceinline__ uint64_t operator()(int64_t i) const {
    return search.passes_filter(query, i) ? format.key(search.distance(query, i), i) : kNoKey;
  }
};

struct SelectScratch {
  unsigned histogram[kDigitValues];  // keys per value of the current digit
  unsigned warp_sums[kWarpThreads];
  unsigned digit;         // the result of find_digit
  unsigned smaller_keys;  // the number of keys with a smaller digit
  unsigned equal_keys;    // the number of keys with this digit; 0: there are fewer keys than the rank
  unsigned gathered;      // the number of keys gathered so far
};

// Finds the digit value at which the running sum of the histogram reaches `rank`, which counts from 1. Stores it in
// `scratch` with the two numbers of keys. Each thread sums an equal share of the histogram.
__device__ __forceinline__ void find_digit(SelectScratch& scratch, unsigned rank) {
  const unsigned lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const unsigned share = kDigitValues / blockDim.x;
  unsigned own = 0;
  for (unsigned i = 0; i < share; ++i) own += scratch.histogram[threadIdx.x * share + i];
  unsigned sum = own;
#pragma unroll
  for (unsigned distance = 1; distance < kWarpThreads; distance *= 2) {
    const unsigned before = __shfl_up_sync(kWholeWarp, sum, distance);
    if (lane >= distance) sum += before;
  }
  if (lane == kWarpThreads - 1) scratch.warp_sums[warp] = sum;
  if (threadIdx.x == 0) scratch.equal_keys = 0;
  __syncthreads();
  for (unsigned i = 0; i < warp; ++i) sum += scratch.warp_sums[i];
  unsigned before = sum - own;
  if (before < rank && rank <= sum) {  // true in one thread at most
    unsigned digit = threadIdx.x * share;
    while (before + scratch.histogram[digit] < rank) before += scratch.histogram[digit++];
    scratch.digit = digit;
    scratch.smaller_keys = before;
    scratch.equal_keys = scratch.histogram[digit];
  }
  __syncthreads();
}

// Returns a number that is at least as large as exactly `rank` keys. If there are fewer than `rank` keys, returns
// kNoKey - 1, which is larger than every key.
template <typename Source>
__device__ __forceinline__ uint64_t key_of_rank(const Source& source, unsigned rank, int key_bits,
                                                SelectScratch& scratch) {
  uint64_t prefix = 0;
  for (int shift = key_bits; shift > 0;) {
    const int bits = min(kDigitBits, shift);
    const uint64_t above = shift == key_bits ? 0 : prefix >> shift;
    const int above_shift = shift;
    shift -= bits;
    for (int i = threadIdx.x; i < kDigitValues; i += blockDim.x) scratch.histogram[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < source.count; i += blockDim.x) {
      const uint64_t key = source(i);
      if (key >> above_shift == above) atomicAdd(&scratch.histogram[key >> shift & ((1u << bits) - 1)], 1u);
    }
    __syncthreads();
    find_digit(scratch, rank);
    if (scratch.equal_keys == 0) return kNoKey - 1;
    prefix |= static_cast<uint64_t>(scratch.digit) << shift;
    rank -= scratch.smaller_keys;
    if (scratch.equal_keys == rank) return prefix | ((uint64_t{1} << shift) - 1);  // all keys with this prefix
  }
  return prefix;
}

// Sorts `size` keys in shared memory with Batcher's bitonic network. `size` is a power of two.
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

// Stores the k smallest keys of the source in `keys`, sorted and padded with kNoKey to `size` entries.
template <typename Source>
__device__ __forceinline__ void select_nearest(const Source& source, int k, int size, int key_bits, uint64_t* keys,
                                               SelectScratch& scratch) {
  const uint64_t last = key_of_rank(source, static_cast<unsigned>(k), key_bits, scratch);
  for (int i = threadIdx.x; i < size; i += blockDim.x) keys[i] = kNoKey;
  if (threadIdx.x == 0) scratch.gathered = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < source.count; i += blockDim.x) {
    const uint64_t key = source(i);
    if (key <= last) keys[atomicAdd(&scratch.gathered, 1u)] = key;
  }
  sort_keys(keys, size);
}

__global__ void __launch_bounds__(kThreadsOfFewBlocks, 1)
    select_kernel(DeviceSearch search, Candidates candidates, bool has_candidates, DeviceKeyFormat format, int k,
                  int size, int key_bits, int32_t* distances, int64_t* positions) {
  __shared__ SelectScratch scratch;
  auto* keys = dynamic_shared<uint64_t>();  // [size]
  wait_for_previous_kernel();
  const int64_t query = blockIdx.x;
  int64_t count = -1;  // the number of candidates; -1: select from all codes
  if (has_candidates) {
    const int64_t counted = candidates.counts[query];
    const bool has_all =
        candidates.is_selective(query) || candidates.bound(query) == format.key(search.bits(), search.codes.count - 1);
    if (counted <= candidates.capacity && (has_all || counted >= k)) count = counted;
  }
  if (count >= 0) {
    const CandidateKeys source{candidates.keys + query * candidates.capacity, count};
    select_nearest(source, k, size, key_bits, keys, scratch);
  } else {
    select_nearest(DatabaseKeys{search, format, query, search.codes.count}, k, size, key_bits, keys, scratch);
  }
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    const bool is_found = keys[i] != kNoKey;
    distances[query * k + i] = is_found ? format.distance(keys[i]) : search.bits() + 1;
    positions[query * k + i] = is_found ? format.position(keys[i]) : -1;
  }
}

}  // namespace

void launch_hamming_select(const HammingSearch& search, const Candidates* candidates, DeviceKeyFormat format, int64_t k,
                           int32_t* distances, int64_t* positions, cudaStream_t stream) {
  const int size = 1 << bit_width(k - 1);
  const int key_bits = format.position_bits + bit_width(8 * search.code_bytes);
  const bool has_few_queries = search.query_count <= device_attribute(cudaDevAttrMultiProcessorCount);
  const LaunchShape shape{search.query_count, has_few_queries ? kThreadsOfFewBlocks : kThreads,
                          size * int64_t{sizeof(uint64_t)}, 1, true};
  launch(select_kernel, shape, stream, DeviceSearch(search), candidates != nullptr ? *candidates : Candidates{},
         candidates != nullptr, format, static_cast<int>(k), size, key_bits, distances, positions);
}

}  // namespace hashengine
