// Hamming search on x86 with AVX2 for a few queries or, without AVX-512, for very long codes.
//
// Preparing a tile for isa/avx2.cpp costs as much as scanning it for several queries. Therefore this kernel reads codes
// in their stored form and counts bits by the scalar popcnt instruction, which every CPU with AVX2 has. For codes of 64
// bits a table lookup per nibble is faster than popcnt: four codes in 11 instructions.

#include "cpu/hamming/kernel.h"

#ifdef HE_X86

#include <immintrin.h>

#include <type_traits>

namespace hashengine {
namespace {

constexpr int64_t kGroupCodes = 8;  // codes that share one test against the bound
// How far ahead codes are prefetched. The processor's own prefetching stops at the end of a page; prefetch_ahead does
// not.
constexpr int64_t kPrefetchBytes = 8192;

int64_t tile_codes(int64_t code_bytes) { return std::max(kTileBytes / code_bytes, kGroupCodes); }

// Prefetches the cache lines of `bytes` bytes that lie kPrefetchBytes ahead. This matters because the search for a
// single query is limited by memory bandwidth.
HE_INLINE void prefetch_ahead(const uint8_t* codes, int64_t bytes) {
  // The address may be beyond the codes: a prefetch of an invalid address has no effect.
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(codes) + kPrefetchBytes;
  for (int64_t byte = 0; byte < bytes; byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + uintptr_t(byte)));
}

// kBytes: the length of a code as a constant; 0: any length.
template <int kBytes>
HE_TARGET_AVX2 void scan_codes(const HammingTile& tile, const uint8_t* query, Selector& selector) {
  const int64_t bytes = kBytes ? kBytes : tile.code_bytes;
  const uint8_t* code = tile.codes;
  uint32_t bound = selector.bound();
  int64_t i = 0;
  for (; i + kGroupCodes <= tile.count; i += kGroupCodes, code += kGroupCodes * bytes) {
    prefetch_ahead(code, kGroupCodes * bytes);
    uint32_t distances[kGroupCodes], is_below = 0;
#pragma GCC unroll 8
    for (int64_t j = 0; j < kGroupCodes; ++j) {
      distances[j] = hamming_distance(query, code + j * bytes, bytes);
      is_below |= distances[j] < bound;
    }
    if (__builtin_expect(!is_below, 1)) continue;
    for (int64_t j = 0; j < kGroupCodes; ++j) selector.push(distances[j], tile.position_of(i + j));
    bound = selector.bound();
  }
  for (; i < tile.count; ++i, code += bytes) selector.push(hamming_distance(query, code, bytes), tile.position_of(i));
}

// The distances of four codes of 64 bits from one query. Every 64-bit word of `query` holds the query.
HE_TARGET_AVX2 HE_INLINE __m256i word_distances(const uint8_t* codes, __m256i query) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i low_nibble = _mm256_set1_epi8(15);
  const __m256i differs = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), query);
  const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(differs, low_nibble));
  const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(differs, 4), low_nibble));
  return _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256());
}

HE_TARGET_AVX2 void scan_words(const HammingTile& tile, const uint8_t* query, Selector& selector) {
  constexpr int64_t kWords = 16;  // codes that share one test against the bound
  const __m256i queries = _mm256_set1_epi64x(int64_t(load_code_word(query, 8)));
  __m256i bound = _mm256_set1_epi64x(selector.bound());
  int64_t i = 0;
  for (; i + kWords <= tile.count; i += kWords) {
    prefetch_ahead(tile.codes + 8 * i, 8 * kWords);
    __m256i is_below = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int64_t j = 0; j < kWords; j += 4)
      is_below =
          _mm256_or_si256(is_below, _mm256_cmpgt_epi64(bound, word_distances(tile.codes + 8 * (i + j), queries)));
    if (__builtin_expect(_mm256_testz_si256(is_below, is_below), 1)) continue;
    for (int64_t j = i; j < i + kWords; ++j)
      selector.push(hamming_distance(query, tile.codes + 8 * j, 8), tile.position_of(j));
    bound = _mm256_set1_epi64x(selector.bound());
  }
  for (; i < tile.count; ++i) selector.push(hamming_distance(query, tile.codes + 8 * i, 8), tile.position_of(i));
}

// Calls function with the length of a code as a constant, 0 if there is no loop for this length.
template <typename Function>
void with_constant_bytes(int64_t code_bytes, Function function) {
  switch (code_bytes) {
    case 4: return function(std::integral_constant<int, 4>());
    case 8: return function(std::integral_constant<int, 8>());
    case 16: return function(std::integral_constant<int, 16>());
    case 32: return function(std::integral_constant<int, 32>());
    case 48: return function(std::integral_constant<int, 48>());
    case 64: return function(std::integral_constant<int, 64>());
    case 96: return function(std::integral_constant<int, 96>());
    case 128: return function(std::integral_constant<int, 128>());
    default: return function(std::integral_constant<int, 0>());
  }
}

void scan(const HammingTile& tile, const QueryBlock& queries, Selector* selectors) {
  with_constant_bytes(tile.code_bytes, [&](auto bytes) {
    for (int64_t q = 0; q < queries.count; ++q) {
      const uint8_t* const query = queries.codes + q * tile.code_bytes;
      if constexpr (bytes() == 8)
        scan_words(tile, query, selectors[q]);
      else
        scan_codes<bytes()>(tile, query, selectors[q]);
    }
  });
}

template <int kBytes>
HE_TARGET_AVX2 void compute_code_distances(const HammingTile& tile, const uint8_t* query, uint32_t* distances) {
  const int64_t bytes = kBytes ? kBytes : tile.code_bytes;
  const uint8_t* code = tile.codes;
  int64_t i = 0;
  for (; i + kGroupCodes <= tile.count; i += kGroupCodes, code += kGroupCodes * bytes) {
    prefetch_ahead(code, kGroupCodes * bytes);
#pragma GCC unroll 8
    for (int64_t j = 0; j < kGroupCodes; ++j) distances[i + j] = hamming_distance(query, code + j * bytes, bytes);
  }
  for (; i < tile.count; ++i, code += bytes) distances[i] = hamming_distance(query, code, bytes);
}

void compute_distances(const HammingTile& tile, const QueryBlock& queries, int64_t query, uint32_t* distances) {
  with_constant_bytes(tile.code_bytes, [&](auto bytes) {
    compute_code_distances<bytes()>(tile, queries.codes + query * tile.code_bytes, distances);
  });
}

}  // namespace

const HammingKernel kHammingPopcnt = {tile_codes,
                                      no_tile_bytes,
                                      no_query_bytes,
                                      prepare_nothing,
                                      prepare_nothing,
                                      scan,
                                      compute_distances,
                                      nullptr,
                                      nullptr,
                                      INT64_MAX,
                                      0,
                                      0};

}  // namespace hashengine

#endif
