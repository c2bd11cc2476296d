// Hamming search for codes that are too long for the kernels of AVX2, with AVX-512's population count: xor, vpopcntq
// and add, and subtraction of the bound. Each instruction processes eight codes.
//
// A tile consists of groups of eight codes, stored word by word: vector w of a group holds the w-th eight bytes of
// every code, zero-padded at the end of the code. Eight queries share each load of a vector.

#include "cpu/hamming/kernel.h"

#ifdef HE_X86

#include <immintrin.h>

#include <cstring>

namespace hashengine {
namespace {

constexpr int64_t kGroup = 8;      // codes per vector of words
constexpr int kSharedQueries = 8;  // queries that share each load of a vector

int64_t words_of(int64_t code_bytes) { return (code_bytes + 7) / 8; }
int64_t groups_of(int64_t codes) { return (codes + kGroup - 1) / kGroup; }

int64_t tile_bytes(int64_t codes, int64_t code_bytes) { return groups_of(codes) * words_of(code_bytes) * 64; }
int64_t tile_codes(int64_t code_bytes) {
  return std::max(kTileBytes / (8 * words_of(code_bytes)) / kGroup * kGroup, kGroup);
}
int64_t query_bytes(int64_t code_bytes) { return 8 * words_of(code_bytes); }

void prepare_queries(const uint8_t* queries, int64_t count, int64_t code_bytes, uint8_t* prepared) {
  std::memset(prepared, 0, size_t(count * query_bytes(code_bytes)));
  for (int64_t q = 0; q < count; ++q)
    std::memcpy(prepared + q * query_bytes(code_bytes), queries + q * code_bytes, size_t(code_bytes));
}

void prepare_tile(const uint8_t* codes, int64_t count, int64_t code_bytes, uint8_t* tile) {
  const int64_t words = words_of(code_bytes);
  std::memset(tile, 0, size_t(tile_bytes(count, code_bytes)));
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* column = tile + (i / kGroup * words * kGroup + i % kGroup) * 8;
    const uint8_t* code = codes + i * code_bytes;
    int64_t byte = 0;
    for (; byte + 8 <= code_bytes; byte += 8) std::memcpy(column + byte * kGroup, code + byte, 8);
    if (byte < code_bytes) std::memcpy(column + byte * kGroup, code + byte, size_t(code_bytes - byte));
  }
}

// Pushes the codes of a group. This path is rare. It is not inlined, so that it takes no registers from the loop.
__attribute__((noinline)) void push_group(const int64_t distances[kGroup], const HammingTile& tile, int64_t first_code,
                                          Selector& selector) {
  const int64_t present = std::min(kGroup, tile.count - first_code);
  for (int64_t i = 0; i < present; ++i) selector.push(uint32_t(distances[i]), tile.position_of(first_code + i));
}

// Scans the whole tile for kQueries queries.
template <int kQueries>
HE_TARGET_AVX512 void scan_queries(const HammingTile& tile, const int64_t* queries, Selector* selectors) {
  const int64_t words = words_of(tile.code_bytes);
  const auto* vectors = reinterpret_cast<const __m512i*>(tile.prepared);
  __m512i bounds[kQueries];
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) bounds[q] = _mm512_set1_epi64(selectors[q].bound());
  for (int64_t code = 0; code < tile.count; code += kGroup, vectors += words) {
    __m512i sums[kQueries];
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q)
      sums[q] =
          _mm512_popcnt_epi64(_mm512_xor_si512(_mm512_load_si512(vectors), _mm512_set1_epi64(queries[q * words])));
#pragma GCC unroll 4
    for (int64_t w = 1; w < words; ++w) {
      const __m512i codes = _mm512_load_si512(vectors + w);
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) {
        const __m512i difference = _mm512_xor_si512(codes, _mm512_set1_epi64(queries[q * words + w]));
        sums[q] = _mm512_add_epi64(sums[q], _mm512_popcnt_epi64(difference));
      }
    }
    // distance - bound is negative if the distance is below the bound. One test of the sign bits serves all queries.
    __m512i any = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) any = _mm512_or_si512(any, _mm512_sub_epi64(sums[q], bounds[q]));
    if (__builtin_expect(_mm512_movepi64_mask(any) == 0, 1)) continue;
    alignas(64) int64_t distances[kQueries][kGroup];
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) _mm512_store_si512(distances[q], sums[q]);
    for (int q = 0; q < kQueries; ++q) push_group(distances[q], tile, code, selectors[q]);
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) bounds[q] = _mm512_set1_epi64(selectors[q].bound());
  }
}

void scan(const HammingTile& tile, const QueryBlock& queries, Selector* selectors) {
  const auto* query = reinterpret_cast<const int64_t*>(queries.prepared);
  const int64_t words = words_of(tile.code_bytes);
  int64_t q = 0;
  for (; q + kSharedQueries <= queries.count; q += kSharedQueries)
    scan_queries<kSharedQueries>(tile, query + q * words, selectors + q);
  for (; q < queries.count; ++q) scan_queries<1>(tile, query + q * words, selectors + q);
}

HE_TARGET_AVX512 void compute_distances(const HammingTile& tile, const QueryBlock& queries, int64_t query,
                                        uint32_t* distances) {
  const int64_t words = words_of(tile.code_bytes);
  const auto* query_words = reinterpret_cast<const int64_t*>(queries.prepared) + query * words;
  const auto* vectors = reinterpret_cast<const __m512i*>(tile.prepared);
  for (int64_t code = 0; code < tile.count; code += kGroup, vectors += words) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t w = 0; w < words; ++w) {
      const __m512i difference = _mm512_xor_si512(_mm512_load_si512(vectors + w), _mm512_set1_epi64(query_words[w]));
      sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(difference));
    }
    alignas(64) int64_t wide[kGroup];
    _mm512_store_si512(wide, sum);
    for (int64_t i = 0; i < kGroup; ++i) distances[code + i] = uint32_t(wide[i]);
  }
}

}  // namespace

const HammingKernel kHammingAvx512 = {tile_codes,
                                      tile_bytes,
                                      query_bytes,
                                      prepare_tile,
                                      prepare_queries,
                                      scan,
                                      compute_distances,
                                      nullptr,
                                      nullptr,
                                      INT64_MAX,
                                      0,
                                      0};

}  // namespace hashengine

#endif
