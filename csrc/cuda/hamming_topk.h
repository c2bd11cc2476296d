// The steps of a top-k search on the GPU: limits from a sample, a scan for candidates, the selection among them.
#pragma once

#include "hamming_candidates.cuh"
#include "hashengine/hamming_cuda.h"

namespace hashengine {

inline int bit_width(int64_t value) {
  int bits = 0;
  for (; value > 0; value >>= 1) ++bits;
  return bits;
}

// How far to look: the limit of a query is the code of this rank among so many, drawn all over the database.
struct HammingSample {
  int64_t count;  // a multiple of kSections, at most half of the codes
  int64_t rank;   // from 1 to count

  static constexpr int kSections = 64;
  static constexpr int kMaxCountOfFew = 4096;  // for a query that has a multiprocessor of its own
  // For a small k a larger sample takes longer than it saves the scan, whose limits move anyway; for a large one it
  // saves candidates, and the memory for them.
  static constexpr int kMaxCountForSmallK = 8192, kMaxCount = 16384;
  static constexpr int kMaxBins = 8192;  // distances that are told apart: a histogram of them takes 32 KB
};

// What is looked at, for how many queries at a time.
//
// Of the k nearest, `expected` = k samples / codes are expected in the sample, with a variance of as much (Poisson).
// The rank is so far beyond that fewer than one query in 10^5 finds too few candidates, and the capacity so far beyond
// the candidates expected at that rank that as few find too many.
struct HammingTopkPlan {
  HammingSample sample{};
  Keys layout{};
  int64_t k;
  int64_t capacity;
  int64_t batch;  // queries whose candidates are held at once

  HammingTopkPlan(const HammingSearch& search, int64_t k);
  // In a workspace of so many `bytes`.
  Candidates candidates(void* workspace, int64_t* bytes = nullptr) const;
};

// launch_hamming_topk by this plan, of which `batch` may be set smaller.
void launch_hamming_topk(const HammingSearch& search, const HammingTopkPlan& plan, int32_t* distances,
                         int64_t* positions, void* workspace, cudaStream_t stream);

// Limits, and counts set to zero.
void launch_hamming_limits(const HammingSearch& search, const HammingSample& sample, const Candidates& candidates,
                           cudaStream_t stream);

// Each scan offers every code within its query's limit.
void launch_hamming_scan_popcount(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream);

// The matrix scans take codes of at most so many 32-bit words.
constexpr int kMaxMatrixWords = 32;
void launch_hamming_scan_mma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream);
void launch_hamming_scan_wgmma(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream);
// Whether this module holds that scan's code for the current device.
bool has_hamming_scan_wgmma();

// The k nearest of each query's candidates; of all codes, where `candidates` is null or a query's are not the right
// ones.
void launch_hamming_select(const HammingSearch& search, const Candidates* candidates, Keys layout, int64_t k,
                           int32_t* distances, int64_t* positions, cudaStream_t stream);

}  // namespace hashengine
