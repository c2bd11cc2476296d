// Hamming search on the GPU. All pointers are device pointers, and no function waits for the device.
#pragma once

#include "hashengine/hamming.h"
#include "hashengine/types.h"

namespace hashengine {

// Whether launch_hamming_topk supports this search. k must be at most 4,096, and the database must have either at most
// 8,192 codes of any length, or fewer than 2^32 codes of at most 8,184 bits each. All other searches need a ranking
// (HammingRanking).
bool can_launch_hamming_topk(const HammingSearch& search, int64_t k);

// Bytes of workspace that launch_hamming_topk needs: up to about a 32nd of the device's memory, but at most about 4 GB,
// and up to 512 MB on a device with less than 16 GB. The workspace may be uninitialized.
int64_t hamming_topk_workspace_bytes(const HammingSearch& search, int64_t k);

// Computes the same results as hamming_topk_cpu.
void launch_hamming_topk(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions,
                         void* workspace, cudaStream_t stream);

// Computes the same results as hamming_count_cpu.
void launch_hamming_count(const HammingSearch& search, const HammingLabels* labels, int64_t* counts, int64_t* relevant,
                          cudaStream_t stream);

// A ranking of the codes within a radius, nearest first. It takes two calls: launch_hamming_ranking_count, then
// launch_hamming_ranking_place. Between them the caller can read the totals and allocate the results. Both calls need
// the same workspace. The second call overwrites what the first one wrote to it.
struct HammingRanking {
  HammingSearch search;
  int64_t radius;
  int64_t max_results;  // per query
};

// The number of queries to rank at a time, so that the workspace stays below about 256 MB. The number does not depend
// on ranking.search.query_count. Callers divide a ranking into batches of this number of queries, of which the last may
// have fewer, and pass each batch to the launchers.
int64_t hamming_ranking_batch(const HammingRanking& ranking);

// The size of a workspace that suffices for every batch of the ranking.
int64_t hamming_ranking_workspace_bytes(const HammingRanking& ranking);

// totals: [query_count], the number of results per query; may be null.
void launch_hamming_ranking_count(const HammingRanking& ranking, int64_t* totals, void* workspace, cudaStream_t stream);

// Writes the results of query q to [lims[q], lims[q + 1]). If `lims` is null, it writes them to
// [q * max_results, (q + 1) * max_results), and fills the unused entries of `distances` with 8 * code_bytes + 1 and
// those of `positions` with -1.
void launch_hamming_ranking_place(const HammingRanking& ranking, const int64_t* lims, int32_t* distances,
                                  int64_t* positions, void* workspace, cudaStream_t stream);

}  // namespace hashengine
