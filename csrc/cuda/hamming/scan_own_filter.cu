// The scan for queries with a filter of their own that selects few codes. The other scans compare such a query with
// every code, and read its filter only for hits.
//
// Idea. A thread reads words of the query's bitmap and visits their set bits. Each selected code becomes a candidate.
// A query is selective if its filter selects fewer codes of the sample than bounds.cu needs for a bound. The other
// scans find no candidates of such a query, except the code with the key 0.
//
// Traffic. For each selective query, the kernel reads the bitmap, which has an eighth of a byte per code, and the
// selected codes. Most selected codes are in different 32-byte sectors.
//
// Launch. 256 threads per block. A block has a segment of 32 KB of one query's bitmap, and ends at once if the query is
// not selective. Each thread has four loads in flight. At least four blocks fit on a multiprocessor.

#include "cuda/common/launch.cuh"
#include "cuda/hamming/topk_steps.h"

namespace hashengine {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kLoads = 4;  // in flight per thread
constexpr int64_t kSegmentBytes = 32 << 10;

// Word: the type in which the bitmap is read.
template <typename Word>
__global__ void __launch_bounds__(kBlockThreads, 4)
    own_filter_kernel(DeviceSearch search, Candidates candidates, int64_t segments) {
  wait_for_previous_kernel();
  const int64_t query = blockIdx.x / segments;
  if (!candidates.is_selective(query)) return;
  constexpr int kWordBits = 8 * sizeof(Word);
  constexpr int64_t kSegmentWords = kSegmentBytes / sizeof(Word);
  const auto* const row = reinterpret_cast<const Word*>(search.filter + query * search.filter_stride);
  const int64_t begin = blockIdx.x % segments * kSegmentWords;
  const int64_t end = min(begin + kSegmentWords, ceil_div<int64_t>(search.codes.count, kWordBits));
  for (int64_t first = begin + threadIdx.x; first < end; first += kLoads * kBlockThreads) {
    uint32_t words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      words[i] = first + i * kBlockThreads < end ? __ldg(row + first + i * kBlockThreads) : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      for (uint32_t word = words[i]; word != 0; word &= word - 1) {
        const int64_t position = (first + i * kBlockThreads) * kWordBits + __ffs(static_cast<int>(word)) - 1;
        if (position >= search.codes.count) break;
        const uint64_t key = candidates.format.key(search.distance(query, position), position);
        if (key != Candidates::kSelective) candidates.add(query, key);  // the other scan has added the key 0
      }
    }
  }
}

}  // namespace

void launch_hamming_scan_own_filter(const HammingSearch& search, const Candidates& candidates, cudaStream_t stream) {
  const int64_t segments = ceil_div(ceil_div<int64_t>(search.code_count, 8), kSegmentBytes);
  const bool has_words = is_aligned(search.filter, 4) && search.filter_stride % 4 == 0;
  launch(has_words ? own_filter_kernel<uint32_t> : own_filter_kernel<uint8_t>,
         {search.query_count * segments, kBlockThreads, 0, 1, true}, stream, DeviceSearch(search), candidates,
         segments);
}

}  // namespace hashengine
