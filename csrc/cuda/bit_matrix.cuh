// The 1-bit matrix instructions: popcounts of the ANDs of rows and columns of 256 bits (eight 32-bit words).
//
// A warp holds 16 rows: its lane 4g + t has words t and t + 4 of rows g and g + 8. With `mma` a warp holds 8 columns,
// too, with `wgmma` four warps share 256 columns in shared memory. Either way lane 4g + t gets sums 4j .. 4j + 3 for
// rows g, g, g + 8, g + 8 and columns 8j + 2t, 8j + 2t + 1, 8j + 2t, 8j + 2t + 1.
//
// mma is native from 8.0 to 9.0, wgmma on 9.0a alone; later architectures have neither in hardware. XOR is native up to
// 8.9 only, hence AND. Outside nvcc the twins in tests/emulation stand in for the instructions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "hashengine/types.h"
#if !defined(__CUDACC__)
#include "matrix_twins.h"
#endif

namespace hashengine {

constexpr int kSliceWords = 8;  // of a row: 256 bits, what one instruction takes
constexpr int kWgmmaColumns = 256;
constexpr int kWgmmaSums = 128;  // a thread
constexpr int kWarpgroupThreads = 128;
constexpr int kColumnTileBytes = kWgmmaColumns * kSliceWords * 4;

// Which of a lane's sums belongs to which row and column.
HE_HOST_DEVICE int row_of_sum(int lane, int sum) { return lane / 4 + 8 * (sum / 2 % 2); }
HE_HOST_DEVICE int column_of_sum(int lane, int sum) { return 8 * (sum / 4) + 2 * (lane % 4) + sum % 2; }

// Where word `word` of a column lies in a tile of columns in shared memory, in words. The unit is the core matrix,
// eight columns by 16 bytes, back to back; the two of the same columns follow each other.
HE_HOST_DEVICE int column_word(int column, int word) {
  return (2 * (column / 8) + word / 4) * 32 + column % 8 * 4 + word % 4;
}

#if defined(__CUDACC__)

// sums = before + popcount(rows & columns); a column's words t and t + 4 are with its lane 4g + t.
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

// The same of half as many bits, words t alone.
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

// Bits 0-13: where the tile begins, 16-29: from one core matrix to the next along a column, 32-45: to the next eight
// columns, all in units of 16 bytes (PTX, matrix descriptor of wgmma; no swizzle).
__device__ __forceinline__ uint64_t column_tile(const uint32_t* tile) {
  constexpr uint64_t kSteps = uint64_t{128 / 16} << 16 | uint64_t{256 / 16} << 32;
  uint32_t begin = static_cast<uint32_t>(__cvta_generic_to_shared(tile) & 0x3ffff) >> 4;
  asm volatile("" : "+r"(begin));  // else the compiler works it out again before each instruction
  return kSteps | begin;
}
// The tile that is so many behind.
__device__ __forceinline__ uint64_t tile_behind(uint64_t tile, int tiles) {
  return tile + static_cast<uint32_t>(tiles) * (kColumnTileBytes / 16);
}

// What threads have stored in shared memory is there for the matrix unit after this and a barrier.
__device__ __forceinline__ void publish_to_matrix_unit() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What was computed is in these registers here. The compiler would else compute it again at each use, to need fewer.
template <size_t kCount>
__device__ __forceinline__ void hold_registers(uint32_t (&values)[kCount]) {
#pragma unroll
  for (size_t i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i]));
}

__device__ __forceinline__ uint32_t or3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;  // one instruction, which the compiler does not find by itself
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
__device__ __forceinline__ const uint32_t* column_tile(const uint32_t* tile) { return tile; }
__device__ __forceinline__ const uint32_t* tile_behind(const uint32_t* tile, int tiles) {
  return tile + tiles * (kColumnTileBytes / 4);
}
__device__ __forceinline__ void publish_to_matrix_unit() {}
template <size_t kCount>
__device__ __forceinline__ void hold_registers(uint32_t (&)[kCount]) {}
__device__ __forceinline__ uint32_t or3(uint32_t a, uint32_t b, uint32_t c) { return a | b | c; }

#endif

}  // namespace hashengine
