// The benchmarks compare the rate of a CPU search with the rates of two functions: `bare_loop` compares queries with
// codes in the first-level cache, and `read_memory` reads memory. Neither stores results. The benchmarks compile this
// file for the machine that they run on.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int kQueries = 8;

#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512F__)
constexpr const char* kSimd = "avx512";
constexpr std::size_t kLanes = 8;  // codes per vector, one in each lane of 64 bits
using Vector = __m512i;
using Hits = __mmask8;

Vector load(const std::uint64_t* words) { return _mm512_loadu_si512(words); }
Vector broadcast(std::uint64_t word) { return _mm512_set1_epi64(word); }
Vector zero() { return _mm512_setzero_si512(); }
Vector add_distance(Vector sum, Vector a, Vector b) {
  return _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(a, b)));
}
Hits less(Vector sum, Vector bound) { return _mm512_cmplt_epi64_mask(sum, bound); }
std::uint64_t any(Hits hits) { return hits; }
#elif defined(__AVX2__)
constexpr const char* kSimd = "avx2";
constexpr std::size_t kLanes = 4;
using Vector = __m256i;
using Hits = __m256i;

Vector load(const std::uint64_t* words) { return _mm256_loadu_si256(reinterpret_cast<const Vector*>(words)); }
Vector broadcast(std::uint64_t word) { return _mm256_set1_epi64x(word); }
Vector zero() { return _mm256_setzero_si256(); }
// Sums each byte position of a lane separately. A sum is at most 16 words x 8 bits = 128, which fits into a byte.
Vector add_distance(Vector sum, Vector a, Vector b) {
  const Vector nibble_counts =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Vector low = _mm256_set1_epi8(15);
  const Vector x = _mm256_xor_si256(a, b);
  const Vector lower = _mm256_shuffle_epi8(nibble_counts, _mm256_and_si256(x, low));
  const Vector upper = _mm256_shuffle_epi8(nibble_counts, _mm256_and_si256(_mm256_srli_epi16(x, 4), low));
  return _mm256_add_epi8(sum, _mm256_add_epi8(lower, upper));
}
Hits less(Vector sum, Vector bound) { return _mm256_cmpgt_epi32(bound, _mm256_sad_epu8(sum, zero())); }
std::uint64_t any(Hits hits) { return static_cast<std::uint32_t>(_mm256_movemask_epi8(hits)); }
#else
constexpr const char* kSimd = "scalar";
constexpr std::size_t kLanes = 1;
using Vector = std::uint64_t;
using Hits = std::uint64_t;

Vector load(const std::uint64_t* words) { return *words; }
Vector broadcast(std::uint64_t word) { return word; }
Vector zero() { return 0; }
Vector add_distance(Vector sum, Vector a, Vector b) { return sum + Vector(__builtin_popcountll(a ^ b)); }
Hits less(Vector sum, Vector bound) { return sum < bound; }
std::uint64_t any(Hits hits) { return hits; }
#endif

// Codes are stored in groups of kLanes codes: first word 0 of each code of the group, then word 1 of each, and so on.
// Therefore a distance needs no sum across lanes. Returns nonzero if a distance is below the bound.
template <int kWords>
std::uint64_t scan(const std::uint64_t* codes, std::size_t count, const std::uint64_t* queries, std::uint64_t bound,
                   std::size_t passes) {
  const Vector bounds = broadcast(bound);
  Hits hits{};
  for (std::size_t pass = 0; pass < passes; ++pass) {
    asm volatile("" ::: "memory");  // so that the compiler does not merge the passes
    for (std::size_t group = 0; group < count / kLanes; ++group) {
      Vector sums[kQueries];
#pragma GCC unroll 8
      for (int query = 0; query < kQueries; ++query) sums[query] = zero();
#pragma GCC unroll 1
      for (int word = 0; word < kWords; ++word) {
        const Vector code = load(codes + (group * kWords + word) * kLanes);
#pragma GCC unroll 8
        for (int query = 0; query < kQueries; ++query)
          sums[query] = add_distance(sums[query], code, broadcast(queries[query * kWords + word]));
      }
#pragma GCC unroll 8
      for (int query = 0; query < kQueries; ++query) hits |= less(sums[query], bounds);
    }
  }
  return any(hits);
}

std::uint64_t read(const std::uint64_t* words, std::size_t count, std::size_t passes) {
  std::uint64_t bits = 0;
  for (std::size_t pass = 0; pass < passes; ++pass) {
    asm volatile("" ::: "memory");
    for (std::size_t i = 0; i < count; ++i) bits |= words[i];
  }
  return bits;
}

// Runs work(thread) in `threads` threads, the caller's included. Returns the OR of the results.
template <typename Work>
std::uint64_t run_threads(int threads, const Work& work) {
  std::vector<std::uint64_t> results(static_cast<std::size_t>(threads));
  std::vector<std::thread> others;
  for (std::size_t t = 1; t < results.size(); ++t) others.emplace_back([&, t] { results[t] = work(t); });
  results[0] = work(0);
  std::uint64_t all = results[0];
  for (std::size_t t = 1; t < results.size(); ++t) {
    others[t - 1].join();
    all |= results[t];
  }
  return all;
}

}  // namespace

extern "C" {

const char* simd() { return kSimd; }

// Each thread compares 8 queries with all codes, `passes` times. Returns nonzero if a distance is below the bound.
// words: the length of a code in 64-bit words, 1, 2, 4, 8 or 16. count: the number of codes, a multiple of 8.
std::uint64_t bare_loop(const std::uint64_t* codes, std::size_t count, int words, const std::uint64_t* queries,
                        std::uint64_t bound, std::size_t passes, int threads) {
  const auto scan_codes = words == 1   ? scan<1>
                          : words == 2 ? scan<2>
                          : words == 4 ? scan<4>
                          : words == 8 ? scan<8>
                                       : scan<16>;
  return run_threads(threads, [&](std::size_t) { return scan_codes(codes, count, queries, bound, passes); });
}

// Each thread reads its share of the words, `passes` times. Returns the OR of all words.
std::uint64_t read_memory(const std::uint64_t* words, std::size_t count, std::size_t passes, int threads) {
  const auto thread_count = static_cast<std::size_t>(threads);
  const std::size_t share = (count + thread_count - 1) / thread_count;
  return run_threads(threads, [&](std::size_t t) {
    const std::size_t begin = std::min(t * share, count);
    return read(words + begin, std::min(share, count - begin), passes);
  });
}

}  // extern "C"
