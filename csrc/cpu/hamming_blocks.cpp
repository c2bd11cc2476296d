// Limits: 2^31 codes a chunk (positions inside are 32-bit); longer databases are cut into more chunks.

#include "hamming_blocks.h"

namespace hashengine {
namespace {

constexpr int64_t kMinQueryBlock = 32;                 // fewer queries do not pay for laying out a tile
constexpr int64_t kMaxQueryBlock = 256;
constexpr int64_t kQueryBytes = 1 << 17;               // laid-out queries of a block pass through the second level
constexpr int64_t kThreadBytes = int64_t(16) << 20;    // of a thread's memory, above one query's
constexpr int64_t kMaxChunkCodes = int64_t(1) << 31;
constexpr int64_t kItemsPerThread = 4;                 // so that a slow core does not hold up the others
constexpr int64_t kSerialBytes = 1 << 20;              // query-code bytes below which waking threads costs more
constexpr int64_t kAlignment = 64;

const HammingKernel& kernel_for([[maybe_unused]] SimdLevel level, [[maybe_unused]] const HammingSearch& search) {
#ifdef HE_X86
  if (level == SimdLevel::kAvx512) return kHammingAvx512;
  if (level == SimdLevel::kAvx2) {
    if (search.code_bytes > kHammingAvx2.max_code_bytes) return kHammingPopcnt;
    const int64_t few = search.code_bytes < 64 ? 2 : 4;  // queries that do not pay for the layout
    const bool is_whole_words = search.code_bytes % 8 == 0;  // a rest of a word costs more than the layout
    return search.query_count <= few && is_whole_words ? kHammingPopcnt : kHammingAvx2;
  }
#endif
  return kHammingScalar;
}

int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

}  // namespace

HammingPlan::HammingPlan(const HammingSearch& search, int64_t per_query, int64_t least_chunk, SimdLevel level,
                         int most_threads)
    : kernel(&kernel_for(level, search)) {
  threads = search.query_count * search.code_count * search.code_bytes < kSerialBytes ? 1 : most_threads;
  const int64_t query_bytes = std::max<int64_t>(kernel->query_bytes(search.code_bytes), 1);
  const int64_t most = std::min(kThreadBytes / per_query, kQueryBytes / query_bytes);
  query_block = std::clamp(ceil_div(search.query_count, kItemsPerThread * threads), kMinQueryBlock, kMaxQueryBlock);
  query_block = std::clamp<int64_t>(most, 1, round_up(query_block, 2));
  query_blocks = ceil_div(search.query_count, query_block);
  // Enough chunks to keep every thread busy, where blocks of queries alone do not.
  const int64_t wanted = threads == 1 ? 1 : ceil_div(kItemsPerThread * threads, query_blocks);
  const int64_t useful = std::max<int64_t>(search.code_count / least_chunk, 1);
  const int64_t needed = ceil_div(search.code_count, kMaxChunkCodes - 64);
  chunk_codes = ceil_div(search.code_count, std::max(std::min(wanted, useful), needed));
  chunk_codes = round_up(std::max<int64_t>(chunk_codes, 1), 64);  // a chunk begins with a word of a bitmap
  chunks = ceil_div(search.code_count, chunk_codes);
}

HammingItem::HammingItem(const HammingPlan& plan, const HammingSearch& search)
    : plan_(plan), search_(search), tiles_(*plan.kernel, search) {
  const int64_t bytes = round_up(plan.query_block, 2) * plan.kernel->query_bytes(search.code_bytes);
  memory_.reset(new uint8_t[size_t(bytes + kAlignment)]);
  prepared_ = memory_.get() + (kAlignment - reinterpret_cast<uintptr_t>(memory_.get()) % kAlignment);
}

void HammingItem::set(int64_t item) {
  chunk = item % plan_.chunks;
  first_code = chunk * plan_.chunk_codes;
  last_code = std::min(first_code + plan_.chunk_codes, search_.code_count);
  first_query = item / plan_.chunks * plan_.query_block;
  const int64_t count = std::min(plan_.query_block, search_.query_count - first_query);
  queries = {prepared_, search_.queries + first_query * search_.code_bytes, count};
  plan_.kernel->prepare_queries(queries.codes, count, search_.code_bytes, prepared_);
}

}  // namespace hashengine
