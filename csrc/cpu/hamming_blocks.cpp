// Limits: 2^31 codes a chunk (positions inside are 32-bit); longer databases are cut into more chunks.

#include "hamming_blocks.h"

#include <sys/mman.h>

#include <new>

#include "hashengine/huge_pages.h"

namespace hashengine {
namespace {

constexpr int64_t kMinQueryBlock = 32;  // fewer queries do not pay for laying out a tile
constexpr int64_t kMaxQueryBlock = 256;
constexpr int64_t kQueryBytes = 1 << 17;    // laid-out queries of a block pass through the second level
constexpr int64_t kLeastBlockCodes = 4096;  // fewer do not pay for a block's tables
constexpr int64_t kItemsPerThread = 2;      // so that a slow core does not hold up the others
constexpr int64_t kSerialBytes = 1 << 20;   // query-code bytes below which waking threads costs more
constexpr int64_t kAlignment = 64;
constexpr int64_t kLongBytes = int64_t(1) << 30;  // query-code bytes that take some milliseconds
constexpr int64_t kHugeBytes = 192 << 10;         // 48 pages: a first-level TLB has about 64 entries

}  // namespace

const HammingKernel& hamming_kernel([[maybe_unused]] SimdLevel level, [[maybe_unused]] const HammingSearch& search) {
#ifdef HE_X86
  if (level == SimdLevel::kAvx512) return kHammingAvx512;
  if (level == SimdLevel::kAvx2) {
    if (search.code_bytes > kHammingAvx2.max_code_bytes) return kHammingPopcnt;
    const int64_t few = search.code_bytes < 64 ? 2 : 4;  // queries that do not pay for the layout
    // A rest of a word costs more than the layout.
    const bool is_whole_words = search.code_bytes % 8 == 0 || search.code_bytes == 4;
    return search.query_count <= few && is_whole_words ? kHammingPopcnt : kHammingAvx2;
  }
#elif defined(HE_ARM)
  // Codes that need no padding are read as they lie, so that few queries are no case of their own.
  if (level == SimdLevel::kNeon && search.code_bytes <= kHammingNeon.max_code_bytes) return kHammingNeon;
#endif
  return kHammingScalar;
}

const HammingKernel* hamming_block_kernel([[maybe_unused]] SimdLevel level, const HammingSearch& search) {
  const HammingKernel* kernel = nullptr;
#ifdef HE_X86
  if (level == SimdLevel::kAvx512) kernel = &kHammingSlicedAvx512;
  if (level == SimdLevel::kAvx2) kernel = &kHammingSlicedAvx2;
#elif defined(HE_ARM)
  if (level == SimdLevel::kNeon) kernel = &kHammingSlicedNeon;
#endif
  const bool fits = kernel && search.code_bytes <= kernel->max_code_bytes;
  return fits && search.code_count >= kLeastBlockCodes ? kernel : nullptr;
}

HammingPlan::HammingPlan(const HammingKernel& kernel, const HammingSearch& search, int64_t per_query,
                         int64_t least_chunk, int most_threads, int64_t most_chunk)
    : kernel(&kernel) {
  threads = search.query_count * search.code_count * search.code_bytes < kSerialBytes ? 1 : most_threads;
  is_long = search.query_count * search.code_count * search.code_bytes >= kLongBytes;
  if (kernel.block_queries) {
    query_block = std::clamp<int64_t>(kHammingThreadBytes / per_query, 1, kernel.block_queries);
  } else {
    const int64_t query_bytes = std::max<int64_t>(kernel.query_bytes(search.code_bytes), 1);
    const int64_t most = std::min(kHammingThreadBytes / per_query, kQueryBytes / query_bytes);
    query_block = std::clamp(ceil_div(search.query_count, kItemsPerThread * threads), kMinQueryBlock, kMaxQueryBlock);
    query_block = std::clamp<int64_t>(most, 1, round_up(query_block, 2));
  }
  query_blocks = ceil_div(search.query_count, query_block);
  // Enough chunks to keep every thread busy, where blocks of queries alone do not, and nine tenths of the time to the
  // end. More cost candidates: each chunk looks for the nearest by itself.
  int64_t wanted = threads == 1 ? 1 : ceil_div(kItemsPerThread * threads, query_blocks);
  while (9 * round_up(query_blocks * wanted, threads) > 10 * query_blocks * wanted) ++wanted;
  const int64_t useful = std::max<int64_t>(search.code_count / least_chunk, 1);
  const int64_t needed = ceil_div(search.code_count, most_chunk);
  chunk_codes = ceil_div(search.code_count, std::max(std::min(wanted, useful), needed));
  chunk_codes = round_up(std::max<int64_t>(chunk_codes, 1), 64);  // a chunk begins with a word of a bitmap
  chunks = ceil_div(search.code_count, chunk_codes);
}

ThreadMemory::~ThreadMemory() {
  if (mapped_) munmap(mapped_, mapped_bytes_);
}

uint8_t* ThreadMemory::reserve(int64_t bytes, bool is_long) {
  if (bytes <= bytes_) return data_;
  if (mapped_) munmap(mapped_, mapped_bytes_);
  const bool is_huge = is_long && bytes >= kHugeBytes;
  const auto alignment = size_t(is_huge ? kHugePage : kAlignment);
  mapped_bytes_ = size_t(round_up(bytes, int64_t(alignment))) + alignment;
  mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) {
    mapped_ = nullptr;
    throw std::bad_alloc();
  }
  data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(mapped_) + alignment - 1) / alignment * alignment);
  bytes_ = bytes;
  if (is_huge) use_huge_pages(data_, int64_t(mapped_bytes_ - alignment));
  return data_;
}

HammingItem::HammingItem(const HammingPlan& plan, const HammingSearch& search)
    : plan_(plan), search_(search), tiles_(*plan.kernel, search) {
  const int64_t queries = std::max(round_up(plan.query_block, 2), plan.kernel->block_queries);
  prepared_ = memory_.reserve(queries * plan.kernel->query_bytes(search.code_bytes), plan.is_long);
}

void HammingItem::set(int64_t item) {
  number = item;
  chunk = item / plan_.query_blocks;
  first_code = chunk * plan_.chunk_codes;
  last_code = std::min(first_code + plan_.chunk_codes, search_.code_count);
  first_query = item % plan_.query_blocks * plan_.query_block;
  const int64_t count = std::min(plan_.query_block, search_.query_count - first_query);
  queries = {prepared_, search_.queries + first_query * search_.code_bytes, count};
  plan_.kernel->prepare_queries(queries.codes, count, search_.code_bytes, prepared_);
}

}  // namespace hashengine
