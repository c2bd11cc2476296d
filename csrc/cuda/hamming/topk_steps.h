// The steps of hamming_topk on the GPU: bounds from a sample, a scan for candidates, the selection among them. The
// functions are defined in bounds.cu, scan_popcount.cu, scan_mma.cu, scan_wgmma.cu and select.cu.
#pragma once

#include "cuda/hamming/candidates.cuh"
#include "hashengine/hamming_cuda.h"

namespace hashengine {

inline int bit_width(int64_t value) {
  int bits = 0;
  for (; value > 0; value >>= 1) ++bits;
  return bits;
}

// The sample of the database from which the bounds are estimated: `count` codes drawn from the whole database. A
// query's bound is the key of the `rank`-th nearest of them.
struct HammingSample {
  int64_t count;  // a multiple of kSections, at most half of the codes
  int64_t rank;   // 1 to count

  static constexpr int kSections = 64;

  // The largest samples. With at most one query per SM, reading the sample is a large part of the search time, so the
  // sample is small. With more queries and a large k, a larger sample reduces the number of candidates and the memory
  // for them. With more queries and a small k, a larger sample takes more time than it saves in the scan, because the
  // scan tightens its bounds anyway.
  static constexpr int kMaxCountForFewQueries = 4096, kMaxCountForSmallK = 8192, kMaxCount = 16384;

  static constexpr int kMaxBins = 8192;  // one 32-bit counter per distance: a histogram of at most 32 KB
};

// The sizes of a search: the sample, the capacity for candidates and the queries per batch.
//
// How many of the k nearest codes are in the sample is random, with the mean k * sample.count / code_count and about
// the same variance (Poisson). The rank exceeds this mean by so much that fewer than one query in 10^5 has fewer than k
// candidates. The capacity exceeds the expected number of candidates by so much that fewer than one query in 10^5 has
// more candidates than the capacity.
struct HammingTopkPlan {
  HammingSample sample{};
  DeviceKeyFormat format{};
  int64_t k;         // results per query
  int64_t capacity;  // candidates per query
  int64_t batch;     // queries whose candidates are in memory at the same time

  HammingTopkPlan(const HammingSearch& search, int64_t result_count);

  // The arrays in a workspace of workspace_bytes() bytes.
  Candidates candidates(void* workspace) const;
  int64_t workspace_bytes() const;
};

// launch_hamming_topk with a given plan, whose `batch` the caller may have reduced.
void launch_hamming_topk(const HammingSearch& search, const HammingTopkPlan& plan, int32_t* distances,
                         int64_t* positions, void* workspace, cudaStream_t stream);

// Estimates the bounds, and sets `counts` and `margin_counts` to zero.
void launch_hamming_bounds(const HammingSearch& search, const HammingSample& sample, const Candidates& candidates,
                           cudaStream_t stream);

// Each scan makes the codes within their query's bound candidates. It may omit a code if at least k candidates are
// nearer (candidates.cuh, Tightening).
void launch_hamming_scan_popcount(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream);
void launch_hamming_scan_mma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream);
void launch_hamming_scan_wgmma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream);

// The longest codes, in 32-bit words, that scan_mma and scan_wgmma support.
constexpr int kMaxMatrixWords = 32;
// Whether this module contains code of scan_wgmma for the current device.
bool has_hamming_scan_wgmma();

// Selects the k nearest of each query's candidates. If `candidates` is null, or if a query has too few or too many
// candidates, it selects from all codes.
void launch_hamming_select(const HammingSearch& search, const Candidates* candidates, DeviceKeyFormat format, int64_t k,
                           int32_t* distances, int64_t* positions, cudaStream_t stream);

}  // namespace hashengine
