// The launchers of hamming_count.cu and hamming_range.cu, for tests/cuda/test_hamming_count_range.py.

#include "hashengine/hamming_cuda.h"

using namespace hashengine;

namespace {

// sizes: query_count, code_count, code_bytes and filter_stride, for a ranking also radius and max_results.
HammingSearch search_of(const int64_t* sizes, const uint8_t* queries, const uint8_t* codes, const uint8_t* filter) {
  return {queries, codes, sizes[0], sizes[1], sizes[2], filter, sizes[3]};
}

HammingRanking ranking_of(const int64_t* sizes, const uint8_t* queries, const uint8_t* codes, const uint8_t* filter) {
  return {search_of(sizes, queries, codes, filter), sizes[4], sizes[5]};
}

}  // namespace

extern "C" {

int64_t workspace_bytes_of_hamming_ranking(const int64_t* sizes) {
  return hamming_ranking_workspace_bytes(ranking_of(sizes, nullptr, nullptr, nullptr));
}

int64_t batch_of_hamming_ranking(const int64_t* sizes) {
  return hamming_ranking_batch(ranking_of(sizes, nullptr, nullptr, nullptr));
}

// Without labels, `words` is -1.
void hamming_count(const int64_t* sizes, const uint8_t* queries, const uint8_t* codes, const uint8_t* filter,
                   const uint64_t* query_labels, const uint64_t* labels, int64_t words, bool any, int64_t* counts,
                   int64_t* relevant) {
  const HammingLabels rows = {query_labels, labels, words, any};
  launch_hamming_count(search_of(sizes, queries, codes, filter), words >= 0 ? &rows : nullptr, counts, relevant,
                       nullptr);
}

void hamming_ranking_count(const int64_t* sizes, const uint8_t* queries, const uint8_t* codes, const uint8_t* filter,
                           int64_t* totals, void* workspace) {
  launch_hamming_ranking_count(ranking_of(sizes, queries, codes, filter), totals, workspace, nullptr);
}

void hamming_ranking_place(const int64_t* sizes, const uint8_t* queries, const uint8_t* codes, const uint8_t* filter,
                           const int64_t* lims, int32_t* distances, int64_t* positions, void* workspace) {
  launch_hamming_ranking_place(ranking_of(sizes, queries, codes, filter), lims, distances, positions, workspace,
                               nullptr);
}

}  // extern "C"
