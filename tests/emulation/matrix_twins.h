// The 1-bit matrix instructions of csrc/cuda/bit_matrix.cuh, in their registers' layout. What wgmma begins is done when
// its thread waits for it: until then the sums hold nonsense, and columns that are overwritten too early make them
// wrong.
#pragma once

#include <cuda_runtime.h>

namespace emulation {

// sums[4] = before[4] + popcounts of rows[4] & columns[2].
void mma_and_popcount(uint32_t* sums, const uint32_t* rows, const uint32_t* columns, const uint32_t* before);

void wgmma_begin();
// sums[count], rows[4]; columns: a tile of 2 * count of them, core matrix by core matrix.
void wgmma_and_popcount(uint32_t* sums, unsigned count, const uint32_t* rows, const uint32_t* columns, bool keep_sums);
void wgmma_wait();

}  // namespace emulation
