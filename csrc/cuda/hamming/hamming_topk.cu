// hamming_topk on the GPU, for the searches that can_launch_hamming_topk accepts; hamming_range.cu serves the others.
//
// Idea. Three steps. bounds.cu estimates a bound per query from a sample. A scan then finds each
// query's candidates, the codes within its bound. select.cu selects the k nearest candidates. The three steps
// together read the codes about once. For a small database only select.cu is launched, and selects from all codes.
// choose_scan() chooses the scan for the device and the search. If each query has a filter of its own, another scan
// adds the candidates of the queries whose filter selects few codes. topk_steps.h declares the steps.
//
// Launch. The queries are divided into batches, so that the candidates of a batch fit into a share of the device's
// memory: a 32nd, but at least 512 MB and at most 4 GB. The share depends on the device alone, so that repeated calls
// take the same memory, also during the capture of a CUDA graph. For 10,000 queries, k = 10 and ten million codes the
// candidates take 2.8 GB, which is one batch on an H200. The three steps are launched once per batch.

#include <algorithm>
#include <cmath>

#include "cuda/common/launch.cuh"
#include "cuda/common/workspace.h"
#include "cuda/hamming/topk_steps.h"

namespace hashengine {
namespace {

constexpr int64_t kMaxSelectedK = 4096;        // select.cu sorts k keys in 32 KB of shared memory
constexpr int64_t kSmallDatabaseCodes = 8192;  // the largest database for which only select.cu is launched
constexpr int64_t kSmallK = 256;               // up to this k, a sample has at most kMaxCountForSmallK codes
constexpr int64_t kMinCandidateBytes = int64_t{512} << 20, kMaxCandidateBytes = int64_t{4} << 30;
constexpr int64_t kCandidateShare = 32;  // the candidates of a batch take this fraction of the device's memory
constexpr int64_t kWgmmaQueries = 256;   // scan_wgmma compares a code with this number of queries at a time

enum class Scan { kPopcount, kMma, kWgmma };

// scan_popcount compares a code with one query at a time, scan_mma with eight, and scan_wgmma with 256. With fewer than
// eight queries scan_mma takes as long as with eight; with fewer than 256 scan_wgmma takes as long as with 256.
// scan_mma is assumed to be faster than scan_popcount from two queries on. scan_wgmma is estimated to be faster than
// scan_mma from about 160 queries on: with one tile of queries it is limited by memory latency. No measurement of
// either number is recorded.
Scan choose_scan(const HammingSearch& search) {
  constexpr int64_t kMinMmaQueries = 2, kMinWgmmaQueries = 160;
  const int64_t major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  const bool has_mma = major == 8 || major == 9;
  if (search.code_bytes > 4 * kMaxMatrixWords || search.query_count < kMinMmaQueries || !has_mma)
    return Scan::kPopcount;
  const bool has_wgmma = major == 9 && search.query_count >= kMinWgmmaQueries && has_hamming_scan_wgmma();
  return has_wgmma ? Scan::kWgmma : Scan::kMma;
}

Candidates take_candidates(const HammingTopkPlan& plan, Workspace& workspace) {
  Candidates candidates{};
  candidates.keys = workspace.take<uint64_t>(plan.batch * plan.capacity);
  candidates.bounds = workspace.take<uint64_t>(plan.batch);
  candidates.counts = workspace.take<unsigned>(plan.batch);
  candidates.margin_counts = workspace.take<unsigned>(plan.batch * Candidates::kMargins);
  candidates.capacity = plan.capacity;
  candidates.k = static_cast<unsigned>(plan.k);
  candidates.format = plan.format;
  return candidates;
}

}  // namespace

HammingTopkPlan::HammingTopkPlan(const HammingSearch& search, int64_t result_count, int64_t device_bytes)
    : k(result_count) {
  format.position_bits = bit_width(search.code_count - 1);
  const bool has_few_queries = search.query_count <= device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t max_sample = has_few_queries ? HammingSample::kMaxCountForFewQueries
                             : k <= kSmallK  ? HammingSample::kMaxCountForSmallK
                                             : HammingSample::kMaxCount;
  constexpr int64_t kMinSample = 1024, kCodesPerSample = 32;
  sample.count = std::clamp<int64_t>(search.code_count / kCodesPerSample, kMinSample, max_sample) /
                 HammingSample::kMultiple * HammingSample::kMultiple;
  sample_bytes = sample.workspace_bytes(search.code_bytes);
  // The constants in the next four lines give the probabilities that topk_steps.h states.
  const double fraction = double(sample.count) / double(search.code_count), expected = double(k) * fraction;
  sample.rank = std::min<int64_t>(int64_t(std::ceil(expected + 4.5 * std::sqrt(expected) + 4)), sample.count);
  const double max_rank = double(sample.rank) + 6 * std::sqrt(double(sample.rank)) + 10;
  capacity = std::min<int64_t>(int64_t(std::ceil(max_rank / fraction)), search.code_count);
  const int64_t queries = std::max<int64_t>(search.query_count, 1);
  const int64_t candidate_bytes = std::clamp(device_bytes / kCandidateShare, kMinCandidateBytes, kMaxCandidateBytes);
  const int64_t max_batch = std::max<int64_t>(candidate_bytes / (capacity * int64_t{sizeof(uint64_t)}), 1);
  // Batches of about equal size, because a small last batch would be inefficient. If the memory suffices, all but the
  // last are multiples of kWgmmaQueries.
  batch = ceil_div(queries, ceil_div(queries, max_batch));
  if (batch < queries) batch = std::min(round_up(batch, kWgmmaQueries), max_batch);
}

Candidates HammingTopkPlan::candidates(void* workspace) const {
  Workspace arrays(workspace);
  return take_candidates(*this, arrays);
}

void* HammingTopkPlan::sample_workspace(void* workspace) const {
  Workspace arrays(workspace);
  take_candidates(*this, arrays);
  return arrays.take<uint8_t>(sample_bytes);
}

int64_t HammingTopkPlan::workspace_bytes() const {
  Workspace measured(nullptr);
  take_candidates(*this, measured);
  measured.take<uint8_t>(sample_bytes);
  return measured.bytes();
}

bool can_launch_hamming_topk(const HammingSearch& search, int64_t k) {
  const bool can_sample = 8 * search.code_bytes < HammingSample::kMaxBins && search.code_count < int64_t{1} << 32;
  return k <= kMaxSelectedK && (search.code_count <= kSmallDatabaseCodes || can_sample);
}

int64_t hamming_topk_workspace_bytes(const HammingSearch& search, int64_t k) {
  if (search.query_count == 0 || search.code_count <= kSmallDatabaseCodes) return 0;
  return HammingTopkPlan(search, k, device_memory_bytes()).workspace_bytes();
}

void launch_hamming_topk(const HammingSearch& search, const HammingTopkPlan& plan, int32_t* distances,
                         int64_t* positions, void* workspace, cudaStream_t stream) {
  const Candidates candidates = plan.candidates(workspace);
  void* const sample_workspace = plan.sample_workspace(workspace);
  for (int64_t first = 0; first < search.query_count; first += plan.batch) {
    const HammingSearch batch = search.slice(first, plan.batch);
    launch_hamming_bounds(batch, plan.sample, candidates, sample_workspace, stream);
    switch (choose_scan(batch)) {
      case Scan::kPopcount: launch_hamming_scan_popcount(batch, candidates, stream); break;
      case Scan::kMma: launch_hamming_scan_mma(batch, candidates, stream); break;
      case Scan::kWgmma: launch_hamming_scan_wgmma(batch, candidates, stream); break;
    }
    if (batch.filter_stride != 0) launch_hamming_scan_own_filter(batch, candidates, stream);
    launch_hamming_select(batch, &candidates, plan.format, plan.k, distances + first * plan.k,
                          positions + first * plan.k, stream);
  }
}

void launch_hamming_topk(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions,
                         void* workspace, cudaStream_t stream) {
  if (search.query_count == 0) return;
  const HammingTopkPlan plan(search, k, device_memory_bytes());
  if (search.code_count <= kSmallDatabaseCodes)
    launch_hamming_select(search, nullptr, plan.format, k, distances, positions, stream);
  else
    launch_hamming_topk(search, plan, distances, positions, workspace, stream);
}

}  // namespace hashengine
