// The scratch memory of a host function that launches kernels, divided into arrays.
#pragma once

#include <cstdint>

#include "hashengine/types.h"

namespace hashengine {

// A bump allocator. Each take() returns the next array, aligned to kAlignment bytes if `base` is aligned to them.
//
// If `base` is null, the allocator only measures: after the same calls of take(), bytes() is the size that the caller
// must allocate. In this case, the pointers that take() returns must not be dereferenced.
class Workspace {
 public:
  static constexpr int64_t kAlignment = 16;

  explicit Workspace(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  // An uninitialised array of `count` elements.
  template <typename T>
  T* take(int64_t count) {
    static_assert(alignof(T) <= kAlignment);
    T* const array = reinterpret_cast<T*>(base_ + static_cast<uintptr_t>(bytes_));
    bytes_ += round_up(count * int64_t{sizeof(T)}, kAlignment);
    return array;
  }

  // The size of all arrays taken so far, padding included.
  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t base_;
  int64_t bytes_ = 0;
};

}  // namespace hashengine
