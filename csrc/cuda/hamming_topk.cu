// The k nearest on the GPU: which steps, over how many queries at a time, with which scan. The table of what a device
// can do is scan_of; the kernels are in the files of the steps, which hamming_topk.h names.
//
// Small databases are selected from directly. Else a limit is set from a sample, a scan keeps the candidates within it,
// and the selection takes the k nearest: three launches, which read the codes once.

#include <algorithm>
#include <cmath>

#include "hamming_topk.h"
#include "launch.cuh"

namespace hashengine {
namespace {

constexpr int64_t kMaxSelected = 4096;    // of a query: sorted in 32 KB of shared memory
constexpr int64_t kSmallDatabase = 8192;  // codes
constexpr int64_t kSmallK = 256;
constexpr int64_t kMaxCandidateBytes = 512 << 20;

enum class Scan { kPopcount, kMma, kWgmma };

// `mma` pays from two queries on: eight cost it what one does. `wgmma` takes 256 at a time.
Scan scan_of(const HammingSearch& search) {
  constexpr int64_t kMmaQueries = 2, kWgmmaQueries = 64;
  const int64_t major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  const bool has_mma = major == 8 || major == 9;
  if (search.code_bytes > 4 * kMaxMatrixWords || search.query_count < kMmaQueries || !has_mma) return Scan::kPopcount;
  const bool has_wgmma = major == 9 && search.query_count >= kWgmmaQueries && has_hamming_scan_wgmma();
  return has_wgmma ? Scan::kWgmma : Scan::kMma;
}

// `count` of the queries, from `first` on.
HammingSearch part_of(HammingSearch search, int64_t first, int64_t count) {
  search.queries += first * search.code_bytes;
  if (search.filter != nullptr) search.filter += first * search.filter_stride;
  search.query_count = std::min(count, search.query_count - first);
  return search;
}

}  // namespace

HammingTopkPlan::HammingTopkPlan(const HammingSearch& search, int64_t k) : k(k) {
  layout.position_bits = bit_width(search.code_count - 1);
  const bool is_few = search.query_count <= device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t most = is_few         ? HammingSample::kMaxCountOfFew
                       : k <= kSmallK ? HammingSample::kMaxCountForSmallK
                                      : HammingSample::kMaxCount;
  sample.count =
      std::clamp<int64_t>(search.code_count / 32, 1024, most) / HammingSample::kSections * HammingSample::kSections;
  const double share = double(sample.count) / double(search.code_count), expected = double(k) * share;
  sample.rank = std::min<int64_t>(int64_t(std::ceil(expected + 4.5 * std::sqrt(expected) + 4)), sample.count);
  const double beyond = double(sample.rank) + 6 * std::sqrt(double(sample.rank)) + 10;
  capacity = std::min<int64_t>(int64_t(std::ceil(beyond / share)), search.code_count);
  const int64_t queries = std::max<int64_t>(search.query_count, 1);
  const int64_t most_at_once = std::max<int64_t>(kMaxCandidateBytes / (capacity * 8), 1);
  batch = ceil_div(queries, ceil_div(queries, most_at_once));  // alike: a few that are left over would take long
}

// The arrays, each a multiple of 16 bytes.
Candidates HammingTopkPlan::candidates(void* workspace, int64_t* bytes) const {
  int64_t used = 0;
  const auto take = [&](auto* type, int64_t count) {
    auto* const array = reinterpret_cast<decltype(type)>(static_cast<char*>(workspace) + used);
    used += round_up(count * int64_t{sizeof(*type)}, 16);
    return array;
  };
  Candidates candidates{};
  candidates.keys = take(candidates.keys, batch * capacity);
  candidates.limits = take(candidates.limits, batch);
  candidates.counts = take(candidates.counts, batch);
  candidates.nearer = take(candidates.nearer, batch * Candidates::kSteps);
  candidates.capacity = capacity;
  candidates.k = static_cast<unsigned>(k);
  candidates.layout = layout;
  if (bytes != nullptr) *bytes = used;
  return candidates;
}

bool is_hamming_selected(const HammingSearch& search, int64_t k) {
  const bool is_sampled = 8 * search.code_bytes < HammingSample::kMaxBins && search.code_count < int64_t{1} << 32;
  return k <= kMaxSelected && (search.code_count <= kSmallDatabase || is_sampled);
}

int64_t hamming_topk_workspace_bytes(const HammingSearch& search, int64_t k) {
  if (search.query_count == 0 || search.code_count <= kSmallDatabase) return 0;
  int64_t bytes = 0;
  HammingTopkPlan(search, k).candidates(nullptr, &bytes);
  return bytes;
}

void launch_hamming_topk(const HammingSearch& search, const HammingTopkPlan& plan, int32_t* distances,
                         int64_t* positions, void* workspace, cudaStream_t stream) {
  const Candidates candidates = plan.candidates(workspace);
  for (int64_t first = 0; first < search.query_count; first += plan.batch) {
    const HammingSearch part = part_of(search, first, plan.batch);
    launch_hamming_limits(part, plan.sample, candidates, stream);
    switch (scan_of(part)) {
      case Scan::kPopcount: launch_hamming_scan_popcount(part, candidates, stream); break;
      case Scan::kMma: launch_hamming_scan_mma(part, candidates, stream); break;
      case Scan::kWgmma: launch_hamming_scan_wgmma(part, candidates, stream); break;
    }
    launch_hamming_select(part, &candidates, plan.layout, plan.k, distances + first * plan.k,
                          positions + first * plan.k, stream);
  }
}

void launch_hamming_topk(const HammingSearch& search, int64_t k, int32_t* distances, int64_t* positions,
                         void* workspace, cudaStream_t stream) {
  if (search.query_count == 0) return;
  const HammingTopkPlan plan(search, k);
  if (search.code_count <= kSmallDatabase)
    launch_hamming_select(search, nullptr, plan.layout, k, distances, positions, stream);
  else
    launch_hamming_topk(search, plan, distances, positions, workspace, stream);
}

}  // namespace hashengine
