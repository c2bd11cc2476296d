// Huge pages: the system clears each page when it is first written, and finds it again by a TLB of few entries.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace hashengine {

constexpr int64_t kHugePage = 2 << 20;

// Asks for them in what is not yet written of [memory, memory + bytes); a hint, which the system may not follow.
inline void use_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + uintptr_t(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace hashengine
