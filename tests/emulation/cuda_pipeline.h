// Asynchronous copies from global to shared memory. The emulator copies the bytes only when the thread that started the
// copy waits for it. Until then the target contains NaN.
#pragma once

#include <cuda_runtime.h>

namespace emulation {

void copy_later(void* shared, const void* global, size_t bytes, size_t zeros);
void commit_copies();
void wait_for_copies(size_t batches_left);

}  // namespace emulation

// Copies all but the last `zeros` of `bytes` bytes, and fills the rest of the target with zeros.
inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes, size_t zeros = 0) {
  emulation::copy_later(shared, global, bytes, zeros);
}
// Makes a batch of all copies that the thread has started since its last commit.
inline void __pipeline_commit() { emulation::commit_copies(); }
// Waits until at most `batches_left` of the thread's batches are unfinished.
inline void __pipeline_wait_prior(size_t batches_left) { emulation::wait_for_copies(batches_left); }
