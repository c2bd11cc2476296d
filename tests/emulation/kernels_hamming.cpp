#include "hamming_bit_rows.cuh"
#include "hamming_topk.h"
#include "launch.cuh"

using namespace hashengine;

namespace {

HammingSearch search_of(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter) {
  return {queries, codes, sizes[0], sizes[1], sizes[2], filter, sizes[3]};
}

// What each lane holds of the rows of the first 16 codes, [lane][4].
__global__ void rows_kernel(DeviceSearch search, uint32_t* out) {
  uint32_t words[1][2][1], rows[1][4];
  BitRows<2>::load(search.codes, 0, search.codes.count, words);
  BitRows<2>::build(words[0], rows);
  BitRows<2>::leave_out(search, 0, search.codes.count, rows);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = rows[0][i];
}

}  // namespace

extern "C" {

void hamming_rows(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter,
                  uint32_t* out) {
  launch(rows_kernel, 1, 32, nullptr, DeviceSearch(search_of(queries, codes, sizes, filter)), out);
}

// sizes: queries, codes, bytes of a code, bytes from one query's bitmap to the next.
int64_t workspace_bytes_of_hamming_topk(const int64_t* sizes, int64_t k) {
  return hamming_topk_workspace_bytes(search_of(nullptr, nullptr, sizes, nullptr), k);
}

void hamming_topk(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter, int64_t k,
                  int32_t* distances, int64_t* positions, void* workspace) {
  launch_hamming_topk(search_of(queries, codes, sizes, filter), k, distances, positions, workspace, nullptr);
}

// samples, rank, capacity.
void hamming_topk_plan(const int64_t* sizes, int64_t k, int64_t* plan) {
  const HammingTopkPlan made(search_of(nullptr, nullptr, sizes, nullptr), k);
  plan[0] = made.sample.count;
  plan[1] = made.sample.rank;
  plan[2] = made.capacity;
}

// A few queries at a time; the workspace is that of all.
void hamming_topk_in_batches(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter,
                             int64_t k, int64_t batch, int32_t* distances, int64_t* positions, void* workspace) {
  const HammingSearch search = search_of(queries, codes, sizes, filter);
  HammingTopkPlan plan(search, k);
  plan.batch = batch;
  launch_hamming_topk(search, plan, distances, positions, workspace, nullptr);
}

// Where in the workspace it stands how many candidates the queries had, and how many fit.
void hamming_topk_counts(const int64_t* sizes, int64_t k, int64_t* place, int64_t* capacity) {
  const HammingTopkPlan plan(search_of(nullptr, nullptr, sizes, nullptr), k);
  const Candidates candidates = plan.candidates(nullptr);
  *place = reinterpret_cast<intptr_t>(candidates.counts);
  *capacity = candidates.capacity;
}

// The steps alone. The arrays are those of Candidates.
void hamming_limits(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter,
                    int64_t samples, int64_t rank, uint64_t* limits, unsigned* counts, unsigned* nearer,
                    int64_t position_bits) {
  launch_hamming_limits(search_of(queries, codes, sizes, filter), {samples, rank},
                        {nullptr, limits, counts, nearer, 0, 0, {int(position_bits)}}, nullptr);
}

void hamming_scan(int64_t scan, const uint8_t* queries, const uint8_t* codes, const int64_t* sizes,
                  const uint8_t* filter, uint64_t* keys, uint64_t* limits, unsigned* counts, unsigned* nearer,
                  int64_t capacity, int64_t k, int64_t position_bits) {
  constexpr decltype(&launch_hamming_scan_popcount) kScans[] = {launch_hamming_scan_popcount, launch_hamming_scan_mma,
                                                                launch_hamming_scan_wgmma};
  kScans[scan](search_of(queries, codes, sizes, filter),
               {keys, limits, counts, nearer, capacity, unsigned(k), {int(position_bits)}}, nullptr);
}

void hamming_select(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter,
                    uint64_t* keys, uint64_t* limits, unsigned* counts, int64_t capacity, int64_t k,
                    int64_t position_bits, int32_t* distances, int64_t* positions) {
  const Candidates candidates{keys, limits, counts, nullptr, capacity, unsigned(k), {int(position_bits)}};
  launch_hamming_select(search_of(queries, codes, sizes, filter), keys != nullptr ? &candidates : nullptr,
                        {int(position_bits)}, k, distances, positions, nullptr);
}

}  // extern "C"
