// Hamming search on the GPU. Every pointer is one of the device's; nothing waits for the device.
#pragma once

#include "hashengine/hamming.h"
#include "hashengine/types.h"

namespace hashengine {

// Whether launch_hamming_topk, which selects the k nearest out of candidates, takes this search: k up to 4,096, codes
// of up to 8,184 bits, or up to 8,192 codes of any length, and below 2^32 codes. For the others there is the ranking.
bool is_hamming_selected(const HammingSearch& search, int64_t k);

// Scratch of launch_hamming_topk; it need not be cleared.
int64_t hamming_topk_workspace_bytes(const HammingSearch& search, int64_t k);

// As hamming_topk_cpu.
void launch_hamming_topk(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions,
                         void* workspace, cudaStream_t stream);

// As hamming_count_cpu.
void launch_hamming_count(const HammingSearch& search, const HammingLabels* labels, int64_t* counts, int64_t* relevant,
                          cudaStream_t stream);

// The ranking of the codes within a radius, nearest first, at most `most` a query. Two launches, between which the
// caller may learn the totals and allocate what they ask for; both need the same workspace. The second uses it up.
struct HammingRanking {
  HammingSearch search;
  int64_t radius;
  int64_t most;
};

// How many queries to rank at a time: as many as leave the workspace at about 256 MB, whatever the number in `search`.
int64_t hamming_ranking_batch(const HammingRanking& ranking);
int64_t hamming_ranking_workspace_bytes(const HammingRanking& ranking);

// totals: [query_count], how many results each query has; null where nobody asks.
void launch_hamming_ranking_count(const HammingRanking& ranking, int64_t* totals, void* workspace, cudaStream_t stream);

// Query q's results go to [lims[q], lims[q + 1]); without lims to [q * most, (q + 1) * most), where places that no
// result takes are filled with 8 code_bytes + 1 and -1.
void launch_hamming_ranking_place(const HammingRanking& ranking, const int64_t* lims, int32_t* distances,
                                  int64_t* positions, void* workspace, cudaStream_t stream);

}  // namespace hashengine
