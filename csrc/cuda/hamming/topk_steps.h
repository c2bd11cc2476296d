// The steps of hamming_topk on the GPU: estimate bounds from a sample, scan for candidates, select from them. The
// functions are defined in bounds.cu, scan_popcount.cu, scan_mma.cu, scan_wgmma.cu, scan_own_filter.cu and select.cu.
#pragma once

#include "cuda/hamming/candidates.cuh"
#include "hashengine/hamming_cuda.h"

namespace hashengine {

// The number of bits of the value without leading zeros; 0 for 0.
inline int bit_width(int64_t value) {
  int bits = 0;
  for (; value > 0; value >>= 1) ++bits;
  return bits;
}

// The bounds are estimated from a sample of `count` codes, which are drawn from the whole database. A query's bound is
// the key of its `rank`-th nearest code in the sample.
struct HammingSample {
  int64_t count;  // a multiple of kMultiple, at most half of the codes
  int64_t rank;   // 1 to count

  static constexpr int kMultiple = 64;

  // The largest sample if there are at most as many queries as SMs. Reading a sample is then a large part of the search
  // time.
  static constexpr int kMaxCountForFewQueries = 4096;
  // The largest sample for more queries and k up to kSmallK (hamming_topk.cu). A larger sample would take more time
  // than it saves in the scan, because the scan reduces its maximum distances anyway.
  static constexpr int kMaxCountForSmallK = 8192;
  // The largest sample for more queries and a larger k. It keeps the number of candidates small, and therefore their
  // memory.
  static constexpr int kMaxCount = 16384;

  static constexpr int kMaxBins = 8192;  // counters per histogram, one per distance: at most 32 KB

  // The size of the workspace in which launch_hamming_bounds stores the sample.
  int64_t workspace_bytes(int64_t code_bytes) const;
};

// The sizes of a search: the sample, the capacity for candidates and the queries per batch.
//
// How many of the k nearest codes are in the sample is random. This number is about Poisson distributed, with the mean
// k * sample.count / code_count. sample.rank exceeds this mean by so much that fewer than one query in 10^5 has fewer
// than k candidates. `capacity` is so large that fewer than one query in 10^5 has more candidates.
struct HammingTopkPlan {
  HammingSample sample{};
  DeviceKeyFormat format{};
  int64_t k;         // results per query
  int64_t capacity;  // candidates per query
  int64_t batch;     // queries per launch; their candidates are in memory at the same time
  int64_t sample_bytes;

  // `device_bytes` is the size of the device's memory.
  HammingTopkPlan(const HammingSearch& search, int64_t result_count, int64_t device_bytes);

  // The arrays of the candidates and the workspace of the sample, in a workspace of workspace_bytes() bytes.
  Candidates candidates(void* workspace) const;
  void* sample_workspace(void* workspace) const;
  int64_t workspace_bytes() const;
};

// launch_hamming_topk with a given plan. The caller may have reduced plan.batch.
void launch_hamming_topk(const HammingSearch& search, const HammingTopkPlan& plan, int32_t* distances,
                         int64_t* positions, void* workspace, cudaStream_t stream);

// Estimates candidates.bounds, and sets candidates.counts and candidates.margin_counts to zero. `workspace` has
// sample.workspace_bytes(search.code_bytes) bytes.
void launch_hamming_bounds(const HammingSearch& search, const HammingSample& sample, const Candidates& candidates,
                           void* workspace, cudaStream_t stream);

// Each scan adds the codes within a query's bound to the query's candidates. It may omit a code if at least k
// candidates are nearer (candidates.cuh, Tightening).
void launch_hamming_scan_popcount(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream);
void launch_hamming_scan_mma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream);
void launch_hamming_scan_wgmma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream);

// For a search with a filter per query: adds the codes that the filters of selective queries (candidates.cuh, Bound)
// select, except the code with the key 0, which the other scan adds.
void launch_hamming_scan_own_filter(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream);

// scan_mma and scan_wgmma support codes of up to this number of 32-bit words.
constexpr int kMaxMatrixWords = 32;
// Whether this module contains code of scan_wgmma for the current device.
bool has_hamming_scan_wgmma();

// Selects the k nearest of each query's candidates. It selects from all codes instead if `candidates` is null, or if
// the query has more candidates than the capacity. It does so too if the query has fewer than k, unless its candidates
// are all codes that pass its filter.
void launch_hamming_select(const HammingSearch& search, const Candidates* candidates, DeviceKeyFormat format, int64_t k,
                           int32_t* distances, int64_t* positions, cudaStream_t stream);

}  // namespace hashengine
