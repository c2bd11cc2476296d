// Codes as rows and queries as columns of `wgmma`, so that one bit of a sum tells a candidate.
//
// The instruction counts bits of ANDs; a distance has to be made of those, and compared with each query's own limit T.
// Both is done by bits that are multiplied along, in unary: n ones, then zeros. (Sums that begin with a number of the
// query's, as those of `mma` do, would do without; here they would take a move each, as long as half of all that is
// done with them.)
//
// Codes of one or two words, 64 bits with their zeros, fit beside their complement in 256 bits: with the row [d, ~d,
// ones] and the column [q, ~q, 64 + T ones] the sum is 64 - distance + 64 + T, and its bit 7 is set where distance <=
// T.
//
// Longer codes, padded to W = 4, 8, 16 or 32 words, b = 32 W bits, take 2b bits, with distance = |q| + |d| - 2 |q & d|:
// the row [d, b/2 - ceil(|d| / 2) ones, b/2 ones] and the column [q, b/2 ones, b/2 - floor((|q| - T) / 2) ones] give |q
// & d| - ceil(|d| / 2) - floor((|q| - T) / 2) + b, and the bit of the value b is set where that is at least b: where
// distance <= T, and for some codes at T + 1, as halves are rounded. Whoever takes candidates looks at their distance
// again. The column needs T <= |q|; else it is all ones, which every code passes. So that this is rare, and sparse
// codes no exception, codes and queries are first XORed with the same arbitrary bits, which changes no distance.
#pragma once

#include "bit_matrix.cuh"
#include "hamming_code.cuh"

namespace hashengine {

template <int kWords>
struct BitRows {
  static_assert(kWords == 2 || kWords == 4 || kWords == 8 || kWords == 16 || kWords == 32);
  static constexpr int kCodeWords = kWords;
  static constexpr bool kHasComplement = kWords == 2;
  static constexpr int kRowWords = kHasComplement ? kSliceWords : 2 * kWords;
  static constexpr int kSlices = kRowWords / kSliceWords;
  static constexpr int kOnes = kHasComplement ? 0 : kWords / 2 / kSliceWords;  // slices of ones alone, a row's last
  static constexpr int kBuilt = kSlices - kOnes;                               // those that depend on the code
  static constexpr int kHalfBits = 16 * kWords;                                // b / 2
  static constexpr int kCandidateBit = kHasComplement ? 128 : 32 * kWords;
  static constexpr int kLaneWords = kHasComplement ? 1 : kWords / 4;  // of a code, that a lane holds

  // The bits that words are XORed with.
  static __device__ __forceinline__ uint32_t scramble(uint32_t word, int index) {
    return kHasComplement ? word : word ^ (0x9e3779b9u * static_cast<uint32_t>(index + 1) ^ 0x5bd1e995u);
  }

  // Word `index` of a field of `ones` ones, then zeros.
  static __device__ __forceinline__ uint32_t unary(int ones, int index) {
    const int here = min(max(ones - 32 * index, 0), 32);
    return here == 32 ? ~0u : (1u << here) - 1;
  }

  // --- rows: of the 16 codes of a warp, lane 4g + t has words t and t + 4 of each slice of g's and (g + 8)'s ---

  // What the lane reads of the codes of some tiles of 16, those of g and of g + 8: words t, t + 4, ..., of two words
  // the one of t's parity. Behind the end the last code stands again, for whoever takes candidates to leave out.
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

  // The lane's words of a tile's slices, those that are built.
  static __device__ __forceinline__ void build(const uint32_t (&words)[2][kLaneWords], uint32_t (&rows)[kBuilt][4]) {
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
        ones += __shfl_xor_sync(~0u, ones, 1);  // of the four lanes that share a row
        ones += __shfl_xor_sync(~0u, ones, 2);
        fill[half] = kHalfBits - (ones + 1) / 2;
      }
#pragma unroll
      for (int i = kLaneWords; i < 2 * kBuilt; ++i) {
        const int index = t + 4 * i - kWords;  // in the two fields behind the code, each of half as many words
#pragma unroll
        for (int half = 0; half < 2; ++half)
          rows[i / 2][i % 2 * 2 + half] = index < kWords / 2 ? unary(fill[half], index) : ~0u;
      }
    }
  }

  // Clears the rows of codes that the filter which all queries share leaves out: no column passes them, but in `mma`
  // those that every distance passes. `slices` hold words of g's row and of (g + 8)'s by turns, of the tile from
  // `first` on.
  template <int kSlicesOfRow, int kHeld>
  static __device__ __forceinline__ void leave_out(const DeviceSearch& search, int64_t first, int64_t end,
                                                   uint32_t (&slices)[kSlicesOfRow][kHeld]) {
    if (search.filter == nullptr || search.filter_stride != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (search.may_find(0, min(first + threadIdx.x % 32 / 4 + 8 * half, end - 1))) continue;
#pragma unroll
      for (int slice = 0; slice < kSlicesOfRow; ++slice)
#pragma unroll
        for (int i = half; i < kHeld; i += 2) slices[slice][i] = 0;
    }
  }

  // --- columns ---

  // Word `index` of the column of a query, whose candidates are at most `largest` away; -1: it has none.
  struct Column {
    int ones;  // of the query, scrambled
    int largest;

    __device__ __forceinline__ uint32_t word(const CodeRows& queries, int64_t query, int index) const {
      if (largest < 0) return 0;
      if constexpr (kHasComplement) {
        if (index >= 4) return unary(64 + largest, index - 4);
        const uint32_t code = index % 2 < queries.words() ? queries.word(query, index % 2) : 0;
        return index < 2 ? code : ~code;
      } else {
        if (largest > ones) return ~0u;
        if (index < kWords) return scramble(index < queries.words() ? queries.word(query, index) : 0, index);
        if (index < kWords + kWords / 2) return ~0u;
        return unary(kHalfBits - (ones - largest) / 2, index - kWords - kWords / 2);
      }
    }
  };

  static __device__ __forceinline__ Column column(const CodeRows& queries, int64_t query, int largest) {
    int ones = 0;
    if constexpr (!kHasComplement)
      for (int i = 0; i < kWords; ++i) ones += __popc(scramble(i < queries.words() ? queries.word(query, i) : 0, i));
    return {ones, largest};
  }
};

// Calls function(BitRows<kWords>()) with the shortest rows that hold codes of so many words.
template <typename Function>
void with_bit_rows(int words, Function function) {
  if (words <= 2) return function(BitRows<2>());
  if (words <= 4) return function(BitRows<4>());
  if (words <= 8) return function(BitRows<8>());
  if (words <= 16) return function(BitRows<16>());
  return function(BitRows<32>());
}

}  // namespace hashengine
