#include "cpu/hamming/candidate_lists.h"

#include <utility>

namespace hashengine {
namespace {

constexpr int64_t kExtraKeys = 512;          // room per query and thread, beyond twice the results expected per chunk
constexpr int64_t kMinKeysPerDistance = 16;  // on average; fewer keys do not repay several counters per distance
constexpr uint32_t kUnbounded = UINT32_MAX;

}  // namespace

QueryBatch next_batch(const HammingSearch& search, int64_t first_query, int64_t max_queries, int64_t bytes_per_query,
                      SimdLevel level) {
  const int64_t count = std::min(search.query_count - first_query, std::max<int64_t>(max_queries, 1));
  for (const HammingKernel* const kernel : bitsliced_hamming_kernels(level, search)) {
    if (kernel == nullptr) continue;
    const int64_t block = std::min(kernel->block_queries, kThreadScratchBytes / bytes_per_query);
    if (block < kernel->min_queries) continue;
    const int64_t remainder = count % block;
    const int64_t in_blocks = count - (remainder >= kernel->min_queries ? 0 : remainder);
    if (in_blocks) return {search.slice(first_query, in_blocks), first_query, kernel};
  }
  const HammingSearch slice = search.slice(first_query, count);
  return {slice, first_query, &hamming_kernel(level, slice)};
}

CandidateLists::CandidateLists(const QueryBatch& batch, const CandidateLimits& limits,
                               const std::vector<uint32_t>& bounds, const ThreadPool& pool, SearchScratch& scratch)
    : format_(batch.search.code_bytes),
      plan_(*batch.kernel, batch.search, limits.bytes_per_query, limits.min_chunk_codes, pool.threads,
            format_.position_count()),
      parts_(size_t(plan_.items())),
      distance_count_(batch.search.distance_count()) {
  const int64_t chunks = std::max<int64_t>(plan_.chunks, 1);  // an empty database has no chunk
  const int64_t capacity = std::min(2 * ceil_div(limits.expected_results, chunks) + kExtraKeys, plan_.chunk_codes);
  while (scratch.parts.size() < parts_.size()) scratch.parts.emplace_back();
  for_each_item(plan_, batch.search, pool, scratch.threads, [&](WorkItem& item, SearchScratch::Thread& thread) {
    const int64_t codes = item.end_code - item.first_code, most = std::min(limits.max_results, codes);
    std::vector<Selector>& selectors = thread.selectors;
    selectors.resize(std::max(selectors.size(), size_t(plan_.query_block)));
    uint32_t* const keys = reserve_keys(thread.keys, plan_.query_block * capacity);
    for (int64_t q = 0; q < item.queries.count; ++q)
      selectors[size_t(q)].reset(format_, most, codes, tightest_bound(item, q, bounds[size_t(item.first_query + q)]),
                                 item.filter_of(q), keys + q * capacity, capacity);
    item.for_each_tile([&](const HammingTile& tile) { plan_.kernel->scan(tile, item.queries, selectors.data()); });
    Part& part = parts_[size_t(item.number)];
    part.begins.push_back(0);
    for (int64_t q = 0; q < item.queries.count; ++q) {
      const Selector& selector = selectors[size_t(q)];
      const int64_t found = selector.found();
      part.begins.push_back(part.begins.back() + found);
      part.bounds.push_back(found == limits.max_results ? selector.bound() : kUnbounded);
    }
    part.keys = reserve_keys(scratch.parts[size_t(item.number)], part.begins.back() + 1);
    for (size_t q = 0; q < size_t(item.queries.count); ++q) selectors[q].copy_to(part.keys + part.begins[q]);
    part.is_done = true;
  });
}

int64_t CandidateLists::found(int64_t query) const {
  int64_t found = 0;
  for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
    const List list = list_of(query, chunk);
    found += list.end - list.begin;
  }
  return found;
}

int64_t CandidateLists::sort(int64_t query, int64_t max_results, int32_t* distances, int64_t* positions) const {
  const bool has_many_keys = found(query) >= kMinKeysPerDistance * distance_count_;
  return has_many_keys ? sort<4>(query, max_results, distances, positions)
                       : sort<1>(query, max_results, distances, positions);
}

// A counting sort by distance. The sort is stable, and both the lists and the keys of a list are in order of position,
// so the result is ordered by (distance, position). Two increments of the same counter in a row are slow, because the
// second must wait for the store of the first. Therefore a list is split into kStreams streams, which have their own
// counters and are visited in turn.
template <int kStreams>
int64_t CandidateLists::sort(int64_t query, int64_t max_results, int32_t* distances, int64_t* positions) const {
  const int64_t rows = kStreams * plan_.chunks;
  // [chunk, stream, distance]: first the number of keys, then the rank of the next key.
  std::vector<int64_t> ranks(size_t(rows * distance_count_), 0);
  for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
    int64_t* const counts = ranks.data() + chunk * kStreams * distance_count_;
    visit<kStreams>(list_of(query, chunk),
                    [&](int64_t stream, uint32_t key) { ++counts[stream * distance_count_ + format_.distance(key)]; });
  }
  int64_t total = 0;
  for (int64_t distance = 0; distance < distance_count_; ++distance) {
    const int64_t begin = total;
    for (int64_t row = 0; row < rows; ++row)
      total += std::exchange(ranks[size_t(row * distance_count_ + distance)], total);
    for (int64_t rank = begin; rank < std::min(total, max_results); ++rank) distances[rank] = int32_t(distance);
  }
  int64_t dropped;
  for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
    int64_t* const next = ranks.data() + chunk * kStreams * distance_count_;
    const List list = list_of(query, chunk);
    visit<kStreams>(list, [&](int64_t stream, uint32_t key) {
      const int64_t rank = next[stream * distance_count_ + format_.distance(key)]++;
      *(rank < max_results ? positions + rank : &dropped) = list.offset + int64_t(format_.position(key));
    });
  }
  return std::min(total, max_results);
}

// Calls visit_key(stream, key) for each key of a list.
template <int kStreams, typename Visit>
void CandidateLists::visit(const List& list, const Visit& visit_key) {
  const int64_t length = (list.end - list.begin) / kStreams;
  for (int64_t i = 0; i < length; ++i)
#pragma GCC unroll 4
    for (int64_t stream = 0; stream < kStreams; ++stream) visit_key(stream, list.begin[stream * length + i]);
  for (const uint32_t* rest = list.begin + kStreams * length; rest != list.end; ++rest) visit_key(kStreams - 1, *rest);
}

uint32_t* CandidateLists::reserve_keys(PageBuffer& buffer, int64_t count) const {
  return reinterpret_cast<uint32_t*>(buffer.reserve(count * int64_t(sizeof(uint32_t)), plan_.is_long));
}

// Derives the tightest bound for query `query` of the item from `bound` and from the finished chunks. If a finished
// chunk has found max_results codes, a code of this item can be a result only if its distance is below that chunk's
// bound. The distance may also equal that bound if the item's chunk precedes the finished one, because codes at equal
// distances are ordered by position.
uint32_t CandidateLists::tightest_bound(const WorkItem& item, int64_t query, uint32_t bound) const {
  for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
    const Part& part = part_at(item.first_query, chunk);
    if (part.is_done && part.bounds[size_t(query)] != kUnbounded)
      bound = std::min(bound, part.bounds[size_t(query)] + (chunk > item.chunk));
  }
  return bound;
}

const CandidateLists::Part& CandidateLists::part_at(int64_t query, int64_t chunk) const {
  return parts_[size_t(chunk * plan_.query_blocks + query / plan_.query_block)];
}

CandidateLists::List CandidateLists::list_of(int64_t query, int64_t chunk) const {
  const Part& part = part_at(query, chunk);
  const auto row = size_t(query % plan_.query_block);
  return {part.keys + part.begins[row], part.keys + part.begins[row + 1], chunk * plan_.chunk_codes};
}

}  // namespace hashengine
