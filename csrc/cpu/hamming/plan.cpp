#include "cpu/hamming/plan.h"

#include <sys/mman.h>

#include <new>

#include "hashengine/huge_pages.h"

namespace hashengine {
namespace {

constexpr int64_t kMinQueryBlock = 32;  // fewer queries do not repay preparing a tile
constexpr int64_t kMaxQueryBlock = 256;
constexpr int64_t kPreparedQueryBytes = 1 << 17;  // per block; read from the second-level cache once per tile
constexpr int64_t kMinBitslicedCodes = 4096;      // fewer codes do not repay the tables of a block
constexpr int64_t kItemsPerThread = 2;            // so that a slow core does not delay the others
// The next two are numbers of compared bytes: the number of queries times the bytes of all codes.
// Comparing fewer takes one thread 0.15 ms. More threads would save at most that, and a search would wait for
// milliseconds if other processes keep the cores busy.
constexpr int64_t kMinParallelBytes = 1 << 22;
constexpr int64_t kLongSearchBytes = int64_t(1) << 30;  // comparing this many is estimated to take milliseconds
constexpr int64_t kMinHugePageBytes = 192 << 10;        // 48 small pages; a first-level TLB has about 64 entries
constexpr int64_t kMinMappedBytes = 64 << 10;  // fewer come from the heap, whose pages earlier calls have touched
constexpr int64_t kAlignment = 64;

uint8_t* aligned(void* memory, uintptr_t alignment) {
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + alignment - 1) / alignment * alignment);
}

}  // namespace

const HammingKernel& hamming_kernel([[maybe_unused]] SimdLevel level, [[maybe_unused]] const HammingSearch& search) {
#ifdef HE_X86
  if (level == SimdLevel::kAvx2 || level == SimdLevel::kAvx512) {
    // The popcount kernel does not prepare tiles, so it is faster for few queries. Codes that end in a partial word
    // (except codes of 4 bytes) are an exception: reading that word costs the popcount kernel more than preparing
    // tiles.
    const int64_t few_queries = search.code_bytes < 64 ? 2 : 4;
    const bool has_whole_words = search.code_bytes % 8 == 0 || search.code_bytes == 4;
    if (search.query_count <= few_queries && has_whole_words) return kHammingPopcnt;
    if (search.code_bytes <= kHammingAvx2.max_code_bytes) return kHammingAvx2;
    return level == SimdLevel::kAvx512 ? kHammingAvx512 : kHammingPopcnt;
  }
#elif defined(HE_ARM)
  // The NEON kernel reads codes of the usual lengths without preparing them, so it also serves few queries.
  if (level == SimdLevel::kNeon && search.code_bytes <= kHammingNeon.max_code_bytes) return kHammingNeon;
#endif
  return kHammingScalar;
}

std::array<const HammingKernel*, 2> bitsliced_hamming_kernels([[maybe_unused]] SimdLevel level,
                                                              const HammingSearch& search) {
  std::array<const HammingKernel*, 2> kernels{};
#ifdef HE_X86
  if (level == SimdLevel::kAvx512) kernels = {&kHammingBitslicedAvx512, &kHammingBitslicedAvx2};
  if (level == SimdLevel::kAvx2) kernels = {&kHammingBitslicedAvx2};
#elif defined(HE_ARM)
  if (level == SimdLevel::kNeon) kernels = {&kHammingBitslicedNeon};
#endif
  for (const HammingKernel*& kernel : kernels)
    if (kernel && (search.code_bytes > kernel->max_code_bytes || search.code_count < kMinBitslicedCodes))
      kernel = nullptr;
  return kernels;
}

HammingPlan::HammingPlan(const HammingKernel& chosen_kernel, const HammingSearch& search, int64_t bytes_per_query,
                         int64_t min_chunk_codes, int max_threads, int64_t max_chunk_codes)
    : kernel(&chosen_kernel) {
  const int64_t compared_bytes = search.query_count * search.code_count * search.code_bytes;
  threads = compared_bytes < kMinParallelBytes ? 1 : max_threads;
  is_long = compared_bytes >= kLongSearchBytes;
  if (kernel->block_queries) {
    query_block = std::clamp<int64_t>(kThreadScratchBytes / bytes_per_query, 1, kernel->block_queries);
  } else {
    const int64_t query_bytes = std::max<int64_t>(kernel->query_bytes(search.code_bytes), 1);
    const int64_t most = std::min(kThreadScratchBytes / bytes_per_query, kPreparedQueryBytes / query_bytes);
    query_block = std::clamp(ceil_div(search.query_count, kItemsPerThread * threads), kMinQueryBlock, kMaxQueryBlock);
    query_block = std::clamp<int64_t>(std::min(most, search.query_count), 1, round_up(query_block, 2));
  }
  query_blocks = ceil_div(search.query_count, query_block);
  // Use the fewest chunks that give every thread kItemsPerThread items and keep the threads busy for nine tenths of the
  // time. More chunks mean more candidates, because every chunk is searched for its own k nearest.
  int64_t wanted = threads == 1 ? 1 : ceil_div(kItemsPerThread * threads, query_blocks);
  while (9 * round_up(query_blocks * wanted, threads) > 10 * query_blocks * wanted) ++wanted;
  const int64_t useful = std::max<int64_t>(search.code_count / min_chunk_codes, 1);
  const int64_t needed = ceil_div(search.code_count, max_chunk_codes);
  chunk_codes = ceil_div(search.code_count, std::max(std::min(wanted, useful), needed));
  chunk_codes = round_up(std::max<int64_t>(chunk_codes, 1), 64);  // so that each chunk begins at a word of a filter
  chunks = ceil_div(search.code_count, chunk_codes);
}

PageBuffer::~PageBuffer() {
  if (mapped_) munmap(mapped_, mapped_bytes_);
}

uint8_t* PageBuffer::reserve(int64_t bytes, bool is_long_search) {
  if (bytes <= bytes_) return data_;
  bytes_ = 0;
  if (bytes < kMinMappedBytes && mapped_ == nullptr) {
    heap_.reset(new uint8_t[size_t(bytes + kAlignment)]);
    data_ = aligned(heap_.get(), kAlignment);
    bytes_ = bytes;
    return data_;
  }
  if (mapped_) munmap(mapped_, mapped_bytes_);
  const bool is_huge = is_long_search && bytes >= kMinHugePageBytes;
  const auto alignment = size_t(is_huge ? kHugePageBytes : kAlignment);
  mapped_bytes_ = size_t(round_up(bytes, int64_t(alignment))) + alignment;
  mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) {
    mapped_ = nullptr;
    throw std::bad_alloc();
  }
  data_ = aligned(mapped_, alignment);
  bytes_ = bytes;
  if (is_huge) use_huge_pages(data_, int64_t(mapped_bytes_ - alignment));
  return data_;
}

WorkItem::WorkItem(const HammingPlan& plan, const HammingSearch& search)
    : plan_(plan), search_(search), tiles_(*plan.kernel, search) {
  const int64_t query_count = std::max(round_up(plan.query_block, 2), plan.kernel->block_queries);
  prepared_queries_ = memory_.reserve(query_count * plan.kernel->query_bytes(search.code_bytes), plan.is_long);
}

void WorkItem::set(int64_t item) {
  number = item;
  chunk = item / plan_.query_blocks;
  first_code = chunk * plan_.chunk_codes;
  end_code = std::min(first_code + plan_.chunk_codes, search_.code_count);
  first_query = item % plan_.query_blocks * plan_.query_block;
  const int64_t count = std::min(plan_.query_block, search_.query_count - first_query);
  queries = {prepared_queries_, search_.queries + first_query * search_.code_bytes, count};
  plan_.kernel->prepare_queries(queries.codes, count, search_.code_bytes, prepared_queries_);
}

}  // namespace hashengine
