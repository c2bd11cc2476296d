// Codes as rows and queries as columns of 1-bit matrices. For each row and column, the matrix instructions compute a
// sum: the number of ones in row & column. Rows and columns are built so that one bit of this sum tells whether the
// code is within T, the query's maximum distance. This file builds rows; query_columns.cuh builds columns.
//
// Idea. The distance must result from such a sum, and must be compared with T, which differs between queries. Therefore
// rows and columns have extra bits: a complement, or a number n in unary ("n ones", followed by zeros). scan_mma.cu
// needs no numbers in unary, because it starts each sum with a number per query. With wgmma that would take an extra
// instruction per sum, and checking a sum takes only half an instruction.
//
// In the following, d is a code, q a query, both padded with zeros, and |d| is the number of ones in d.
//
// Codes of up to 64 bits are padded to 64 bits, and rows and columns have 256 bits:
//
//   row     [d, ~d, 128 ones]
//   column  [q, ~q, 64 + T ones]
//   sum     (64 - distance) + (64 + T); the bit of value 128 is set exactly if distance <= T
//
// Longer codes are padded to b = 128, 256, 512 or 1,024 bits, and rows and columns have 2b bits. They use the
// equation distance = |q| + |d| - 2 |q & d|:
//
//   row     [d, b/2 - ceil(|d| / 2) ones, b/2 ones]
//   column  [q, b/2 ones, b/2 - floor((|q| - T) / 2) ones]
//   sum     |q & d| - ceil(|d| / 2) - floor((|q| - T) / 2) + b; the bit of value b is set if distance <= T
//
// Only the last number of a column depends on T. Because |d| / 2 and (|q| - T) / 2 are rounded, the bit is also set for
// some codes at distance T + 1; the exact distance of every hit is computed later. The column requires T <= |q|. If T
// is larger, the column is all ones and admits every code. This would be frequent for codes with few ones. Therefore
// codes and queries are first XORed with the same arbitrary bits, which does not change distances.
#pragma once

#include "cuda/hamming/bit_matrix.cuh"
#include "cuda/hamming/device_search.cuh"

namespace hashengine {

// Rows and columns for codes of up to kWords words of 32 bits.
template <int kWords>
struct BitRows {
  static_assert(kWords == 2 || kWords == 4 || kWords == 8 || kWords == 16 || kWords == 32);
  static constexpr int kCodeWords = kWords;
  static constexpr bool kHasComplement = kWords == 2;
  static constexpr int kRowWords = kHasComplement ? kSliceWords : 2 * kWords;
  static constexpr int kSlices = kRowWords / kSliceWords;
  // A slice is kSliceWords words of a row. The first kBuiltSlices slices depend on the code. The last kOnesSlices
  // slices are all ones.
  static constexpr int kOnesSlices = kHasComplement ? 0 : kWords / 2 / kSliceWords;
  static constexpr int kBuiltSlices = kSlices - kOnesSlices;
  static constexpr int kHalfBits = 16 * kWords;                             // b / 2
  static constexpr int kCandidateBit = kHasComplement ? 128 : 32 * kWords;  // set in the sum of a hit
  static constexpr int kLaneWords = kHasComplement ? 1 : kWords / 4;        // words of a code per lane

  // XORs word `index` of a code or query with the arbitrary bits, except if kHasComplement.
  static __device__ __forceinline__ uint32_t scramble(uint32_t word, int index) {
    return kHasComplement ? word : word ^ (0x9e3779b9u * static_cast<uint32_t>(index + 1) ^ 0x5bd1e995u);
  }

  // Word `index` of a number in unary: `ones` ones, followed by zeros.
  static __device__ __forceinline__ uint32_t unary(int ones, int index) {
    const int ones_here = min(max(ones - 32 * index, 0), 32);
    return ones_here == 32 ? ~0u : (1u << ones_here) - 1;
  }

  // A warp holds tiles of 16 codes; lane 4g + t has words t and t + 4 of each slice of codes g and g + 8.

  // Loads the lane's words of codes g and g + 8 of each tile: words t, t + 4 and so on, or only word t % 2 if
  // kHasComplement. The first tile begins at position `first`. From position `end` on, rows repeat the code before
  // `end`; the caller must ignore their sums.
  template <int kTiles>
  static __device__ __forceinline__ void load(const CodeRows& codes, int64_t first, int64_t end,
                                              uint32_t (&words)[kTiles][2][kLaneWords]) {
    const int lane = static_cast<int>(threadIdx.x % 32), word = lane % (kHasComplement ? 2 : 4);
    if (codes.has_whole_words && codes.bytes == 4 * kWords && first + 16 * kTiles <= end) {
      const auto* const from = reinterpret_cast<const uint32_t*>(codes.rows) + (first + lane / 4) * kWords + word;
#pragma unroll
      for (int row = 0; row < 2 * kTiles; ++row)
#pragma unroll
        for (int i = 0; i < kLaneWords; ++i) words[row / 2][row % 2][i] = __ldg(from + 8 * row * kWords + 4 * i);
      return;
    }
#pragma unroll
    for (int row = 0; row < 2 * kTiles; ++row) {
      const int64_t position = min(first + 8 * row + lane / 4, end - 1);
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i)
        words[row / 2][row % 2][i] = word + 4 * i < codes.words() ? codes.word(position, word + 4 * i) : 0;
    }
  }

  // Loads all words of a code, and scrambles them.
  static __device__ __forceinline__ void load_code(const CodeRows& codes, int64_t position, uint32_t (&words)[kWords]) {
    if (codes.has_whole_words && codes.bytes == 4 * kWords) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = scramble(codes.whole_word(position, i), i);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = scramble(i < codes.words() ? codes.word(position, i) : 0, i);
    }
  }

  // Builds the lane's words of a tile's first kBuiltSlices slices. `words` comes from load().
  static __device__ __forceinline__ void build(const uint32_t (&words)[2][kLaneWords],
                                               uint32_t (&rows)[kBuiltSlices][4]) {
    const int t = static_cast<int>(threadIdx.x % 4);
    if constexpr (kHasComplement) {
      const uint32_t flip = t < 2 ? 0 : ~0u;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows[0][half] = words[half][0] ^ flip;
        rows[0][2 + half] = ~0u;
      }
    } else {
      int fill[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int ones = 0;
#pragma unroll
        for (int i = 0; i < kLaneWords; ++i) {
          rows[i / 2][i % 2 * 2 + half] = scramble(words[half][i], t + 4 * i);
          ones += __popc(rows[i / 2][i % 2 * 2 + half]);
        }
        ones += __shfl_xor_sync(~0u, ones, 1);  // sums over the four lanes that hold the same row
        ones += __shfl_xor_sync(~0u, ones, 2);
        fill[half] = kHalfBits - (ones + 1) / 2;
      }
#pragma unroll
      for (int i = kLaneWords; i < 2 * kBuiltSlices; ++i) {
        // The index in the two unary numbers that follow the code. Each number has kWords / 2 words.
        const int index = t + 4 * i - kWords;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          rows[i / 2][i % 2 * 2 + half] = index < kWords / 2 ? unary(fill[half], index) : ~0u;
      }
    }
  }

  // If all queries share one filter, sets the rows of the codes that it excludes to zero. Then no column has a hit with
  // them. `slices` holds words of rows g and g + 8 alternately. The tile begins at position `first`.
  template <int kRowSlices, int kSliceLaneWords>
  static __device__ __forceinline__ void clear_filtered_rows(const DeviceSearch& search, int64_t first, int64_t end,
                                                             uint32_t (&slices)[kRowSlices][kSliceLaneWords]) {
    if (search.filter == nullptr || search.filter_stride != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (search.passes_filter(0, min(first + threadIdx.x % 32 / 4 + 8 * half, end - 1))) continue;
#pragma unroll
      for (int slice = 0; slice < kRowSlices; ++slice)
#pragma unroll
        for (int i = half; i < kSliceLaneWords; i += 2) slices[slice][i] = 0;
    }
  }
};

// Calls function(BitRows<kWords>()) with the smallest supported kWords that is at least `words`.
template <typename Function>
void with_bit_rows(int words, Function function) {
  if (words <= 2) return function(BitRows<2>());
  if (words <= 4) return function(BitRows<4>());
  if (words <= 8) return function(BitRows<8>());
  if (words <= 16) return function(BitRows<16>());
  return function(BitRows<32>());
}

}  // namespace hashengine
