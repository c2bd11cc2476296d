// The 1-bit matrix instructions of csrc/cuda/hamming/bit_matrix.cuh, with the same register layout. The emulation
// executes a wgmma only when its thread waits for it. Until then the sums are invalid. If the columns are overwritten
// before the wait, the sums become wrong. A launch fails if a thread changes the rows before the wait, starts the first
// wgmma after a wait without a fence, or starts another wgmma than the other threads of its warpgroup.
#pragma once

#include <cuda_runtime.h>

namespace emulation {

// sums[4] = before[4] + popcount(rows & columns), with the lane's words in rows[4] and columns[2].
void mma_and_popcount(uint32_t* sums, const uint32_t* rows, const uint32_t* columns, const uint32_t* before);

// The address of a variable in the shared memory of its block, in bytes.
uint32_t shared_address(const void* variable);
void wgmma_fence();
// The lane has sums[count] and rows[4]. columns: the descriptor of a tile of 2 * count columns (bit_matrix.cuh).
void wgmma_and_popcount(uint32_t* sums, unsigned count, const uint32_t* rows, uint64_t columns, bool accumulate);
void wgmma_wait();

}  // namespace emulation
