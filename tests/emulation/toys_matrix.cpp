// Toy kernels that test the emulated matrix instructions and __match_any_sync. wgmma_kernel can make a known mistake,
// which must change its result.

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/hamming/wgmma.cuh"

using namespace hashengine;

namespace {

// Loads the lane's words of the warp's 16 rows. The matrix is [16 * warps][kSliceWords].
__device__ void load_rows(const uint32_t* matrix, uint32_t (&rows)[4]) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (int i = 0; i < 4; ++i)
    rows[i] = matrix[(16 * warp + lane / 4 + 8 * (i % 2)) * kSliceWords + lane % 4 + 4 * (i / 2)];
}

template <size_t kCount>
__device__ void store_sums(const uint32_t (&sums)[kCount], int columns, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (int i = 0; i < static_cast<int>(kCount); ++i)
    out[(16 * warp + row_of_sum(lane, i)) * columns + column_of_sum(lane, i)] = sums[i];
}

// Adds `before` to each element of the product of 16 rows and 8 columns, each of kSliceWords words.
__global__ void mma_kernel(const uint32_t* rows, const uint32_t* columns, uint32_t before, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t added[4] = {before, before, before, before};
  uint32_t own[4], sums[4];
  load_rows(rows, own);
  const uint32_t* const column = columns + lane / 4 * kSliceWords;
  const uint32_t words[2] = {column[lane % 4], column[lane % 4 + 4]};
  mma_and_popcount(sums, own, words, added);
  store_sums(sums, 8, out);
}

enum Mistake {
  kNone,
  kNoWait,
  kColumnsOverwritten,
  kSwappedStrides,
  kNoFence,
  kRowsChanged,
  kOneWarpDiffers,
  kOneWarpStops
};

// Computes twice the product of 64 rows and 256 columns: the second wgmma adds the same product to the sums of the
// first.
__global__ void wgmma_kernel(const uint32_t* rows, const uint32_t* columns, uint32_t* out, int mistake) {
  auto* tile = dynamic_shared<uint32_t>();
  for (int i = threadIdx.x; i < kWgmmaColumns * kSliceWords; i += blockDim.x)
    tile[column_word(i / kSliceWords, i % kSliceWords)] = columns[i];
  fence_matrix_reads();
  __syncthreads();
  uint32_t own[4], sums[kWgmmaSums] = {};
  load_rows(rows, own);
  uint64_t descriptor = column_tile_descriptor(lower_column_tile_descriptor(tile));
  if (mistake == kSwappedStrides)
    descriptor = (descriptor & 0x3fff) | (descriptor >> 32 & 0x3fff) << 16 | (descriptor >> 16 & 0x3fff) << 32;
  const bool is_first_warp = threadIdx.x < kWarpThreads;
  if (mistake != kNoFence) wgmma_fence();
  wgmma_and_popcount<false>(sums, own, descriptor);
  if (mistake == kOneWarpStops && is_first_warp) return;
  if (mistake == kOneWarpDiffers && is_first_warp)
    wgmma_and_popcount<false>(sums, own, descriptor);
  else
    wgmma_and_popcount<true>(sums, own, descriptor);
  if (mistake == kRowsChanged) own[0] = ~own[0];
  if (mistake == kColumnsOverwritten && threadIdx.x == 0) tile[0] = ~tile[0];
  if (mistake != kNoWait) wgmma_wait(sums);
  store_sums(sums, kWgmmaColumns, out);
}

// Stores, for each lane, the mask of the lanes with the same value.
__global__ void match_kernel(const int* values, unsigned* out) {
  out[threadIdx.x] = __match_any_sync(kWholeWarp, values[threadIdx.x]);
}

}  // namespace

extern "C" {

void toy_mma(const uint32_t* rows, const uint32_t* columns, int64_t before, uint32_t* out) {
  launch(mma_kernel, 1, 32, nullptr, rows, columns, uint32_t(before), out);
}

void toy_wgmma(const uint32_t* rows, const uint32_t* columns, uint32_t* out, int64_t mistake) {
  launch(wgmma_kernel, LaunchShape{1, kWarpgroupThreads, kColumnTileBytes}, nullptr, rows, columns, out, int(mistake));
}

void toy_match(const int* values, unsigned* out, int64_t warps) {
  launch(match_kernel, 1, int(32 * warps), nullptr, values, out);
}

}  // extern "C"
