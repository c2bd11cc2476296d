// The launchers of hamming_topk and of its steps, for tests/cuda/test_hamming_topk.py.

#include "cuda/common/launch.cuh"
#include "cuda/hamming/bit_rows.cuh"
#include "cuda/hamming/topk_steps.h"

using namespace hashengine;

namespace {

// sizes: query_count, code_count, code_bytes, filter_stride.
HammingSearch search_of(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter) {
  return {queries, codes, sizes[0], sizes[1], sizes[2], filter, sizes[3]};
}

// Builds the matrix rows of 16 codes. Each lane holds four words of them, which it stores in out[lane][4].
__global__ void rows_kernel(DeviceSearch search, uint32_t* out) {
  uint32_t words[1][2][1], rows[1][4];
  BitRows<2>::load(search.codes, 0, search.codes.count, words);
  BitRows<2>::build(words[0], rows);
  BitRows<2>::clear_filtered_rows(search, 0, search.codes.count, rows);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = rows[0][i];
}

}  // namespace

extern "C" {

void hamming_rows(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter,
                  uint32_t* out) {
  launch(rows_kernel, 1, 32, nullptr, DeviceSearch(search_of(queries, codes, sizes, filter)), out);
}

int64_t workspace_bytes_of_hamming_topk(const int64_t* sizes, int64_t k) {
  return hamming_topk_workspace_bytes(search_of(nullptr, nullptr, sizes, nullptr), k);
}

void hamming_topk(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter, int64_t k,
                  int32_t* distances, int64_t* positions, void* workspace) {
  launch_hamming_topk(search_of(queries, codes, sizes, filter), k, distances, positions, workspace, nullptr);
}

// Stores sample.count, sample.rank, capacity and batch of the plan in `out`.
void hamming_topk_plan(const int64_t* sizes, int64_t k, int64_t device_bytes, int64_t* out) {
  const HammingTopkPlan plan(search_of(nullptr, nullptr, sizes, nullptr), k, device_bytes);
  out[0] = plan.sample.count;
  out[1] = plan.sample.rank;
  out[2] = plan.capacity;
  out[3] = plan.batch;
}

// Runs hamming_topk in batches of `batch` queries. The workspace has the size for a single batch of all queries.
void hamming_topk_in_batches(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter,
                             int64_t k, int64_t batch, int32_t* distances, int64_t* positions, void* workspace) {
  const HammingSearch search = search_of(queries, codes, sizes, filter);
  HammingTopkPlan plan(search, k, device_memory_bytes());
  plan.batch = batch;
  launch_hamming_topk(search, plan, distances, positions, workspace, nullptr);
}

// Stores in `offset` the byte at which Candidates::counts begins in the workspace, and in `capacity` the number of
// candidates for which each query has memory.
void hamming_topk_counts(const int64_t* sizes, int64_t k, int64_t* offset, int64_t* capacity) {
  const HammingTopkPlan plan(search_of(nullptr, nullptr, sizes, nullptr), k, device_memory_bytes());
  const Candidates candidates = plan.candidates(nullptr);
  *offset = reinterpret_cast<intptr_t>(candidates.counts);
  *capacity = candidates.capacity;
}

int64_t workspace_bytes_of_hamming_bounds(const int64_t* sizes, int64_t samples) {
  return HammingSample{samples, 1}.workspace_bytes(sizes[2]);
}

// The following functions run one step each. Their arrays have the names of the members of Candidates.

void hamming_bounds(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter,
                    int64_t samples, int64_t rank, uint64_t* bounds, unsigned* counts, unsigned* margin_counts,
                    int64_t position_bits, void* workspace) {
  launch_hamming_bounds(search_of(queries, codes, sizes, filter), {samples, rank},
                        {nullptr, bounds, counts, margin_counts, 0, 0, {int(position_bits)}}, workspace, nullptr);
}

// scan: 0 is scan_popcount, 1 scan_mma, 2 scan_wgmma, 3 scan_own_filter.
void hamming_scan(int64_t scan, const uint8_t* queries, const uint8_t* codes, const int64_t* sizes,
                  const uint8_t* filter, uint64_t* keys, uint64_t* bounds, unsigned* counts, unsigned* margin_counts,
                  int64_t capacity, int64_t k, int64_t position_bits) {
  constexpr decltype(&launch_hamming_scan_popcount) kScans[] = {
      launch_hamming_scan_popcount, launch_hamming_scan_mma, launch_hamming_scan_wgmma, launch_hamming_scan_own_filter};
  kScans[scan](search_of(queries, codes, sizes, filter),
               {keys, bounds, counts, margin_counts, capacity, unsigned(k), {int(position_bits)}}, nullptr);
}

void hamming_select(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter,
                    uint64_t* keys, uint64_t* bounds, unsigned* counts, int64_t capacity, int64_t k,
                    int64_t position_bits, int32_t* distances, int64_t* positions) {
  const Candidates candidates{keys, bounds, counts, nullptr, capacity, unsigned(k), {int(position_bits)}};
  launch_hamming_select(search_of(queries, codes, sizes, filter), keys != nullptr ? &candidates : nullptr,
                        {int(position_bits)}, k, distances, positions, nullptr);
}

}  // extern "C"
