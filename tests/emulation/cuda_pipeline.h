// Asynchronous copies from global to shared memory. A copy takes place when its thread waits for it; until then the
// target contains NaN.
#pragma once

#include <cuda_runtime.h>

namespace emulation {

void copy_later(void* shared, const void* global, size_t bytes, size_t zeros);
void commit_copies();
void wait_for_copies(size_t batches_left);

}  // namespace emulation

// Fills the last `zeros` bytes with zeros instead of copying them.
inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes, size_t zeros = 0) {
  emulation::copy_later(shared, global, bytes, zeros);
}
inline void __pipeline_commit() { emulation::commit_copies(); }
inline void __pipeline_wait_prior(size_t batches_left) { emulation::wait_for_copies(batches_left); }
