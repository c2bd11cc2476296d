// The candidates of a batch of queries: one list per query and chunk of the database. The lists of a query are merged
// into results ordered by (distance, position). Top-k and range searches use these lists.
#pragma once

#include <deque>
#include <vector>

#include "cpu/hamming/plan.h"
#include "hashengine/hamming.h"

namespace hashengine {

// Consecutive queries of a search, and the kernel that scans for them.
struct QueryBatch {
  HammingSearch search;  // for these queries only
  int64_t first_query;
  const HammingKernel* kernel;
};

// The next batch: at most `max_queries` queries, starting with `first_query`. The batch uses the bit-sliced kernel if
// at least that kernel's min_queries are available and fit in a thread's scratch memory. It then consists of full
// blocks of queries and perhaps a last block of at least min_queries; a shorter remainder is left for the next batch.
// Otherwise the batch uses a kernel that takes any number of queries. bytes_per_query: see HammingPlan.
QueryBatch next_batch(const HammingSearch& search, int64_t first_query, int64_t max_queries, int64_t bytes_per_query,
                      SimdLevel level);

// Scratch memory that the batches of a search use one after another, so that the system zeroes its pages only once.
struct SearchScratch {
  explicit SearchScratch(int thread_count) : threads(size_t(thread_count)) {}

  struct Thread {
    std::vector<Selector> selectors;  // [query of the block]
    PageBuffer keys;
  };
  std::vector<Thread> threads;
  std::deque<PageBuffer> parts;  // [chunk, block of queries]
};

struct CandidateLimits {
  int64_t max_results;       // the number of nearest codes that each query needs
  int64_t expected_results;  // per query; more results are possible, but take more memory
  int64_t bytes_per_query;   // see HammingPlan
  int64_t min_chunk_codes;
};

class CandidateLists {
 public:
  // Makes one list per query and chunk: the nearest codes with a distance below bounds[query], at most
  // limits.max_results. A list may lack codes that cannot be results because another chunk has enough nearer ones. The
  // lists are stored in `scratch` until the next CandidateLists uses it.
  CandidateLists(const QueryBatch& batch, const CandidateLimits& limits, const std::vector<uint32_t>& bounds,
                 const ThreadPool& pool, SearchScratch& scratch);

  // The number of candidates of a query in all chunks together; it may exceed max_results.
  int64_t found(int64_t query) const;

  // Writes the first candidates of a query, at most max_results, ordered by (distance, position). Returns their number.
  int64_t sort(int64_t query, int64_t max_results, int32_t* distances, int64_t* positions) const;

 private:
  // The candidates that one work item found.
  struct Part {
    uint32_t* keys;
    std::vector<int64_t> begins;  // [query of the block]: its first key in `keys`; the last entry is the end
    // [query of the block]: the final bound; kUnbounded if the item found fewer than max_results candidates.
    std::vector<uint32_t> bounds;
    std::atomic<bool> is_done{false};
  };

  // The candidates of one query in one chunk, in order of position. Positions count from `offset`.
  struct List {
    const uint32_t* begin;
    const uint32_t* end;
    int64_t offset;
  };

  template <int kStreams>
  int64_t sort(int64_t query, int64_t max_results, int32_t* distances, int64_t* positions) const;
  template <int kStreams, typename Visit>
  static void visit(const List& list, const Visit& visit_key);

  uint32_t* reserve_keys(PageBuffer& buffer, int64_t count) const;
  uint32_t tightest_bound(const WorkItem& item, int64_t query, uint32_t bound) const;
  const Part& part_at(int64_t query, int64_t chunk) const;
  List list_of(int64_t query, int64_t chunk) const;

  const KeyFormat format_;
  const HammingPlan plan_;
  std::vector<Part> parts_;  // [chunk, block of queries]
  const int64_t distance_count_;
};

}  // namespace hashengine
