// The queries of a block as columns of 1-bit matrices, in shared memory, for scan_wgmma. bit_rows.cuh defines the bits
// of a column.
//
// A column has the query's code, which is stored once, and a number in unary, which is stored whenever the query's
// maximum distance changes. Both consist of groups of four words, so that an instruction stores 16 bytes. An exception
// is a column that admits every code: all its bits are ones, also in place of the code.
#pragma once

#include "cuda/common/vec.cuh"
#include "cuda/hamming/bit_rows.cuh"

namespace hashengine {

template <int kWords>
struct QueryColumns {
  using Rows = BitRows<kWords>;
  using FourWords = Vector<uint32_t, 4>;

  // The groups of four words of a column: the code (for codes of two words also its complement), ones, the number in
  // unary. The columns of codes of four words have only two words of ones, which the number therefore includes.
  static constexpr int kGroups = Rows::kRowWords / 4;
  static constexpr int kCodeGroups = Rows::kHasComplement ? 1 : kWords / 4;
  static constexpr int kUnaryGroups = kWords <= 4 ? 1 : kWords / 8;
  // Added to a limit: the column admits every code.
  static constexpr int kAdmitsAll = 1 << 14;

  static constexpr int kTileWords = Rows::kSlices * (kColumnTileBytes / 4);  // of 256 columns

  uint32_t* words;  // column tiles: for each 256 columns, kSlices tiles one after another
  int16_t* limits;  // of each column, the maximum distance, or this plus kAdmitsAll

  // The first word of a column. Word w of the column that comes c columns later has the offset column_word(c, w) from
  // it, provided that both columns are in the same tile and that the sum of c % 8 and the first column's number modulo
  // 8 is less than 8.
  __device__ __forceinline__ uint32_t* begin(int column) const {
    const auto number = static_cast<unsigned>(column);
    return words + number / kWgmmaColumns * kTileWords + column_word(number % kWgmmaColumns, 0);
  }

  // Words 4 * group to 4 * group + 3 of the column that begins at `column`.
  static __device__ __forceinline__ FourWords& group(uint32_t* column, int group) {
    return vector_at<4>(column, group / 2 * (kColumnTileBytes / 4) + column_word(0, group % 2 * 4));
  }
  static __device__ __forceinline__ const FourWords& group(const uint32_t* column, int group) {
    return vector_at<4>(column, group / 2 * (kColumnTileBytes / 4) + column_word(0, group % 2 * 4));
  }

  // Stores a column without hits; update() then sets the maximum distance.
  __device__ __forceinline__ void store(const CodeRows& queries, int64_t query, int column) const {
    store_code(queries, query, begin(column));
    store_unary(begin(column), 0);
    limits[column] = -1;
  }

  // Stores a column without hits that belongs to no query.
  __device__ __forceinline__ void store_empty(int column) const {
    for (int i = 0; i < kGroups; ++i) group(begin(column), i) = {};
    limits[column] = -1;
  }

  __device__ __forceinline__ void update(const CodeRows& queries, int64_t query, int column, int max_distance) const {
    const int limit = limits[column];
    const bool admits_all = limit >= kAdmitsAll;
    if (max_distance == (admits_all ? limit - kAdmitsAll : limit)) return;
    limits[column] = static_cast<int16_t>(max_distance);
    uint32_t* const words_of_column = begin(column);
    if constexpr (Rows::kHasComplement) {
      store_unary(words_of_column, max_distance < 0 ? 0 : 64 + max_distance);
    } else {
      if (admits_all) store_code(queries, query, words_of_column);
      int ones = 0;
#pragma unroll
      for (int i = 0; i < kCodeGroups; ++i) {
        const FourWords four = group(words_of_column, i);
#pragma unroll
        for (int j = 0; j < 4; ++j) ones += __popc(four.at[j]);
      }
      if (max_distance > ones) {
        for (int i = 0; i < kGroups; ++i) group(words_of_column, i) = {~0u, ~0u, ~0u, ~0u};
        limits[column] = static_cast<int16_t>(max_distance + kAdmitsAll);
        return;
      }
      constexpr int kOnesBefore = kWords == 4 ? 64 : 0;
      store_unary(words_of_column, max_distance < 0 ? 0 : kOnesBefore + Rows::kHalfBits - (ones - max_distance) / 2);
    }
  }

  // Computes the distance between a code and the query of the column that begins at `column`. `code` is the result of
  // BitRows::load_code(). If the column admits every code, the result is undefined.
  static __device__ __forceinline__ int distance(const uint32_t (&code)[kWords], const uint32_t* column) {
    constexpr int kWidth = kWords < 4 ? kWords : 4;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kCodeGroups; ++i) {
      const auto query = vector_at<kWidth>(group(column, i).at, 0);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum += __popc(query.at[j] ^ code[4 * i + j]);
    }
    return sum;
  }

 private:
  static __device__ __forceinline__ void store_code(const CodeRows& queries, int64_t query, uint32_t* column) {
    for (int i = 0; i < kCodeGroups; ++i) {
      FourWords four;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int word = Rows::kHasComplement ? j % 2 : 4 * i + j;
        const uint32_t code = Rows::scramble(word < queries.words() ? queries.word(query, word) : 0, word);
        four.at[j] = Rows::kHasComplement && j >= 2 ? ~code : code;
      }
      group(column, i) = four;
    }
    for (int i = kCodeGroups; i < kGroups - kUnaryGroups; ++i) group(column, i) = {~0u, ~0u, ~0u, ~0u};
  }

  static __device__ __forceinline__ void store_unary(uint32_t* column, int ones) {
#pragma unroll
    for (int i = 0; i < kUnaryGroups; ++i) {
      FourWords four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.at[j] = Rows::unary(ones, 4 * i + j);
      group(column, kGroups - kUnaryGroups + i) = four;
    }
  }
};

}  // namespace hashengine
