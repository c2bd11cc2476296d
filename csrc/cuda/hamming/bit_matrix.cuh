// The 1-bit matrix instructions `mma` and `wgmma`. They compute sum[row][column] = popcount(row & column). Rows and
// columns have 256 bits (eight 32-bit words); `mma` also exists for 128 bits.
//
// Layout. A warp holds 16 rows in registers: lane 4g + t has words t and t + 4 of rows g and g + 8. With `mma` the warp
// also holds 8 columns in registers. With `wgmma`, a warpgroup (four warps, 64 rows) shares 256 columns in shared
// memory. Lane 4g + t receives the following sums of its warp. j is 0 for `mma`, and 0 to 31 for `wgmma`:
//
//   sum      row     column
//   4j       g       8j + 2t
//   4j + 1   g       8j + 2t + 1
//   4j + 2   g + 8   8j + 2t
//   4j + 3   g + 8   8j + 2t + 1
//
// Limits. The hardware has the 1-bit `mma` on compute capability 8.0 to 9.0, and `wgmma` only on 9.0 (in code for
// 9.0a). For 10.0 and 12.0, nvcc 13.0 emulates the 1-bit `mma` with 8-bit matrix instructions. The kernels use AND
// because the hardware has `mma` with XOR only up to 8.9. Without nvcc, host functions in tests/emulation replace the
// instructions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "hashengine/types.h"
#if !defined(__CUDACC__)
#include "matrix_instructions.h"
#endif

namespace hashengine {

constexpr int kSliceWords = 8;  // a slice is the part of a row or column that one instruction processes: 256 bits
constexpr int kWgmmaColumns = 256;
constexpr int kWgmmaSums = 128;  // per thread
constexpr int kWarpgroupThreads = 128;
constexpr int kColumnTileBytes = kWgmmaColumns * kSliceWords * 4;  // a column tile is one slice of 256 columns

// The row and the column of a lane's sum, where `sum` is its number in the table above.
HE_HOST_DEVICE unsigned row_of_sum(unsigned lane, unsigned sum) { return lane / 4 + 8 * (sum / 2 % 2); }
HE_HOST_DEVICE unsigned column_of_sum(unsigned lane, unsigned sum) { return 8 * (sum / 4) + 2 * (lane % 4) + sum % 2; }

// The offset, in words, of word `word` of a column within a column tile in shared memory. A tile consists of core
// matrices. A core matrix is contiguous and has 16 bytes of each of eight columns. The two core matrices of the same
// columns are adjacent.
HE_HOST_DEVICE unsigned column_word(unsigned column, unsigned word) {
  return (2 * (column / 8) + word / 4) * 32 + column % 8 * 4 + word % 4;
}

// The descriptor of a column tile for wgmma (see "matrix descriptor" in the PTX manual; no swizzle). In units of 16
// bytes, bits 0-13 are the tile's address in shared memory, bits 16-29 the stride between the two core matrices of the
// same columns, and bits 32-45 the stride between groups of eight columns.
constexpr uint64_t kDescriptorStrides = uint64_t{128 / 16} << 16 | uint64_t{256 / 16} << 32;
// The lower word of the descriptor of the column tile at `address`.
HE_HOST_DEVICE uint32_t lower_descriptor(uint32_t address) {
  return static_cast<uint32_t>(kDescriptorStrides) | (address & 0x3ffff) >> 4;
}
// The descriptor of the column tile that is stored `tiles` column tiles after the one whose descriptor has the lower
// word `lower`. Addresses in shared memory are so small that the addition changes no stride.
HE_HOST_DEVICE uint64_t column_tile_descriptor(uint32_t lower, int tiles = 0) {
  return (kDescriptorStrides >> 32) << 32 | (lower + static_cast<uint32_t>(tiles) * (kColumnTileBytes / 16));
}

#if defined(__CUDACC__)

// sums = before + popcount(rows & columns). Lane 4g + t passes words t and t + 4 of column g.
__device__ __forceinline__ void mma_and_popcount(uint32_t (&sums)[4], const uint32_t (&rows)[4],
                                                 const uint32_t (&columns)[2], const uint32_t (&before)[4]) {
#if __CUDA_ARCH__ < 1000
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]), "r"(before[0]),
        "r"(before[1]), "r"(before[2]), "r"(before[3]));
#endif
}

// The same for rows and columns of 128 bits: lane 4g + t passes word t of rows g and g + 8 and of column g.
__device__ __forceinline__ void mma_and_popcount(uint32_t (&sums)[4], const uint32_t (&rows)[2],
                                                 const uint32_t (&columns)[1], const uint32_t (&before)[4]) {
#if __CUDA_ARCH__ < 1000
  asm volatile(
      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(columns[0]), "r"(before[0]), "r"(before[1]), "r"(before[2]), "r"(before[3]));
#endif
}

// The lower word of a column tile's descriptor. A kernel should store it in a volatile variable in shared memory and
// read it back once. Otherwise the compiler computes it again for each wgmma.
__device__ __forceinline__ uint32_t lower_column_tile_descriptor(const uint32_t* tile) {
  return lower_descriptor(static_cast<uint32_t>(__cvta_generic_to_shared(tile)));
}

// Call this after storing columns in shared memory and before the barrier. After the barrier, wgmma sees the stores.
__device__ __forceinline__ void fence_matrix_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keeps the values in registers. Otherwise the compiler recomputes them at each use.
template <size_t kCount>
__device__ __forceinline__ void pin_registers(uint32_t (&values)[kCount]) {
#pragma unroll
  for (size_t i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i]));
}

// a & b. Assembly ensures that a comparison of the result with zero takes no further instruction.
__device__ __forceinline__ uint32_t masked(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("and.b32 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// a | b | c. Assembly ensures that it is a single instruction.
__device__ __forceinline__ uint32_t or3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xfe;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

#else

__device__ __forceinline__ void mma_and_popcount(uint32_t (&sums)[4], const uint32_t (&rows)[4],
                                                 const uint32_t (&columns)[2], const uint32_t (&before)[4]) {
  emulation::mma_and_popcount(sums, rows, columns, before);
}
__device__ __forceinline__ void mma_and_popcount(uint32_t (&sums)[4], const uint32_t (&rows)[2],
                                                 const uint32_t (&columns)[1], const uint32_t (&before)[4]) {
  const uint32_t whole_rows[4] = {rows[0], rows[1], 0, 0}, whole_columns[2] = {columns[0], 0};
  emulation::mma_and_popcount(sums, whole_rows, whole_columns, before);
}
__device__ __forceinline__ uint32_t lower_column_tile_descriptor(const uint32_t* tile) {
  return lower_descriptor(emulation::shared_address(tile));
}
__device__ __forceinline__ void fence_matrix_reads() {}
template <size_t kCount>
__device__ __forceinline__ void pin_registers(uint32_t (&)[kCount]) {}
__device__ __forceinline__ uint32_t masked(uint32_t a, uint32_t b) { return a & b; }
__device__ __forceinline__ uint32_t or3(uint32_t a, uint32_t b, uint32_t c) { return a | b | c; }

#endif

}  // namespace hashengine
