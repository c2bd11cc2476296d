// A queue of parts that contain hits, for scan_wgmma; each warp has one. A hit is a pair of a query and a code whose
// sum has the candidate bit (bit_rows.cuh). A lane's sums for 256 queries are divided into parts. A lane with hits
// queues the numbers of its parts, and the scan continues. Later, each lane takes an entry, computes the distances of
// its parts, and adds the hits to the candidates. 32 entries thus share the instructions and the latency.
//
// Instructions, for codes of 64 bits (SASS of nvcc 13.0 for sm_90a). A warp executes 28 to queue the hits of all lanes,
// and about 460 to process 32 entries that have one part and one hit each. About 300 of them compute the 32 distances
// of a part. Longer codes have smaller parts, although these take more instructions to queue.
//
// Limits. An entry has one part or several, so a lane needs at most one entry for 256 queries. The queue is emptied
// when it has no space for an entry of each lane, so it cannot overflow.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/hamming/candidates.cuh"
#include "cuda/hamming/query_columns.cuh"

namespace hashengine {

template <int kWords>
struct PartQueue {
  static constexpr int kParts = kWords <= 4 ? 4 : kWords <= 8 ? 8 : 16;
  static constexpr int kPartSums = kWgmmaSums / kParts;
  static constexpr unsigned kCapacity = 120;
  static constexpr unsigned kMaxCount = kCapacity - kWarpThreads;  // the most entries before a call of push()

  // An entry consists of two numbers. The first is the position of the warp's first code, divided by 16. The second
  // has the bits of the parts, the lane (5 bits from bit kLaneShift on) and the query tile.
  static constexpr int kLaneShift = 16, kTileShift = 21;
  static_assert(kParts <= kLaneShift && kLaneShift + 5 == kTileShift);

  uint2 entries[kCapacity];

  // Adds an entry for each lane of which `has_hits` is true. The other arguments are those of the lane's entry.
  // `lanes` are the lanes for which has_hits is true, and `count` the number of entries. The whole warp must call.
  __device__ __forceinline__ void push(bool has_hits, unsigned lanes, uint32_t parts, int tile, int64_t first,
                                       unsigned& count) {
    const unsigned lane = threadIdx.x % kWarpThreads;
    const unsigned slot = count + __popc(lanes & ((1u << lane) - 1));
    if (has_hits)
      entries[slot] = make_uint2(static_cast<unsigned>(first / 16),
                                 parts | lane << kLaneShift | static_cast<unsigned>(tile) << kTileShift);
    count += __popc(lanes);
  }

  // Adds hits to the candidates: those of all entries if `adds_all` is true or if there are fewer than 32, otherwise
  // those of a multiple of 32 entries, so that every lane has an entry. The other entries remain. The whole warp must
  // call.
  __device__ __forceinline__ void drain(const DeviceSearch& search, const Candidates& candidates,
                                        const QueryColumns<kWords>& columns, int64_t first_query, bool adds_all,
                                        unsigned& count) const {
    const unsigned rest = adds_all || count < kWarpThreads ? 0 : count % kWarpThreads;
    __syncwarp();
    for (unsigned i = rest + threadIdx.x % kWarpThreads; i < count; i += kWarpThreads)
      add_hits(search, candidates, columns, first_query, entries[i]);
    __syncwarp();
    count = rest;
  }

 private:
  static __device__ __forceinline__ void add_hits(const DeviceSearch& search, const Candidates& candidates,
                                                  const QueryColumns<kWords>& columns, int64_t first_query,
                                                  const uint2& entry) {
    using Rows = BitRows<kWords>;
    using Columns = QueryColumns<kWords>;
    const unsigned lane = entry.y >> kLaneShift & (kWarpThreads - 1), tile = entry.y >> kTileShift;
    const int64_t first = int64_t{entry.x} * 16 + row_of_sum(lane, 0);
    uint32_t codes[2][kWords];  // of the two rows of the lane's sums
#pragma unroll
    for (int half = 0; half < 2; ++half)
      Rows::load_code(search.codes, min(first + 8 * half, search.codes.count - 1), codes[half]);
    for (uint32_t parts = entry.y & ((1u << kParts) - 1); parts != 0; parts &= parts - 1) {
      const unsigned part = static_cast<unsigned>(__ffs(static_cast<int>(parts)) - 1);
      const int first_column = static_cast<int>(tile * kWgmmaColumns + column_of_sum(lane, part * kPartSums));
      const uint32_t* const words = columns.begin(first_column);
      uint32_t hits = 0;  // one bit per sum of the part
#pragma unroll
      for (unsigned sum = 0; sum < kPartSums; ++sum) {
        const unsigned column = column_of_sum(0, sum);
        const int distance = Columns::distance(codes[sum / 2 % 2], words + column_word(column, 0));
        hits |= static_cast<uint32_t>(distance <= columns.limits[first_column + column]) << sum;
      }
      for (; hits != 0; hits &= hits - 1) {
        const unsigned sum = static_cast<unsigned>(__ffs(static_cast<int>(hits)) - 1), column = column_of_sum(0, sum);
        const int64_t query = first_query + first_column + column, position = first + row_of_sum(0, sum);
        if (position >= search.codes.count) continue;
        uint32_t code[kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) code[i] = sum / 2 % 2 == 0 ? codes[0][i] : codes[1][i];
        int distance = Columns::distance(code, words + column_word(column, 0));
        if (!Rows::kHasComplement && columns.limits[first_column + column] >= Columns::kAdmitsAll)
          distance = search.distance(query, position);
        candidates.add_if_within_bound(search, query, position, distance);
      }
    }
  }
};

}  // namespace hashengine
