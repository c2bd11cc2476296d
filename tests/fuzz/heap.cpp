// The growth of the heap memory in use since heap_watch(), and the peak of this number since heap_start(), in bytes.
// Both are counted by hooks of AddressSanitizer's allocator.

#include <atomic>
#include <cstddef>
#include <cstdint>

extern "C" {  // as declared in sanitizer/allocator_interface.h, which some GCC packages lack
int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t), void (*)(const volatile void*));
size_t __sanitizer_get_allocated_size(const volatile void*);
}

namespace {

std::atomic<int64_t> used{0}, peak{0};

void allocated(const volatile void*, size_t bytes) {
  const int64_t now = used += int64_t(bytes);
  for (int64_t seen = peak; now > seen && !peak.compare_exchange_weak(seen, now);) {
  }
}

void freed(const volatile void* pointer) {
  if (pointer) used -= int64_t(__sanitizer_get_allocated_size(pointer));
}

}  // namespace

extern "C" {
// Returns 0 if no more hooks can be installed.
int heap_watch() { return __sanitizer_install_malloc_and_free_hooks(allocated, freed); }

void heap_start() { peak = used.load(); }

int64_t heap_used() { return used; }

int64_t heap_peak() { return peak; }
}
