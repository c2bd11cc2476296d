// Huge pages have 2 MB instead of 4 KB. One page fault then provides 512 times as much memory, and a few TLB entries
// cover a large buffer.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace hashengine {

constexpr int64_t kHugePageBytes = 2 << 20;

// Asks the system to back [memory, memory + bytes) with huge pages. This is a hint. It has the most effect before the
// memory is first written: the system merges existing small pages only later, in the background, or never.
inline void use_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t page = uintptr_t(kHugePageBytes);
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + uintptr_t(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace hashengine
