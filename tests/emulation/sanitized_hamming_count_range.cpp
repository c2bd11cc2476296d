#include <algorithm>
#include <vector>

#include "hashengine/hamming_cuda.h"
#include "sanitized.h"

using namespace hashengine;

namespace {

// words: 64-bit words of labels per code, 0 without labels. offset: bytes from a 16-byte boundary to queries and codes.
void run_one(int64_t queries, int64_t codes, int64_t code_bytes, int64_t offset, int64_t words, bool filter_per_query) {
  const int64_t filter_bytes = ceil_div<int64_t>(codes, 8), bins = 8 * code_bytes + 1;
  Array query_rows(queries * code_bytes, offset, 0x11), code_rows(codes * code_bytes, offset, 0);
  Array filter((filter_per_query ? queries : 1) * filter_bytes, 0);
  const HammingSearch search = {
      query_rows.get<uint8_t>(), code_rows.get<uint8_t>(),           queries, codes, code_bytes,
      filter.get<uint8_t>(),     filter_per_query ? filter_bytes : 0};

  Array query_labels(8 * queries * words, 0, 1), labels(8 * codes * words, 0, 1);
  Array counts(8 * queries * bins, 0), relevant(8 * queries * bins, 0);
  const HammingLabels rows = {query_labels.get<uint64_t>(), labels.get<uint64_t>(), words, words > 1};
  launch_hamming_count(search, words ? &rows : nullptr, counts.get<int64_t>(), relevant.get<int64_t>(), nullptr);

  const HammingRanking ranking = {search, std::min<int64_t>(8 * code_bytes, 1200), codes};  // larger radii are slow
  Array workspace(hamming_ranking_workspace_bytes(ranking), 0), totals(8 * queries, 0);
  Array distances(4 * queries * codes, 0), positions(8 * queries * codes, 0);
  launch_hamming_ranking_count(ranking, totals.get<int64_t>(), workspace.get(), nullptr);
  emulation_synchronise();  // the host reads `totals`
  std::vector<int64_t> lims(static_cast<size_t>(queries) + 1);
  for (int64_t q = 0; q < queries; ++q) lims[size_t(q) + 1] = lims[size_t(q)] + totals.get<int64_t>()[q];
  launch_hamming_ranking_place(ranking, lims.data(), distances.get<int32_t>(), positions.get<int64_t>(),
                               workspace.get(), nullptr);
  launch_hamming_ranking_count(ranking, nullptr, workspace.get(), nullptr);
  if (codes > 0)
    launch_hamming_ranking_place(ranking, nullptr, distances.get<int32_t>(), positions.get<int64_t>(), workspace.get(),
                                 nullptr);
  emulation_synchronise();  // before `lims` is freed
}

// Arguments: queries, codes, code_bytes, offset, words, filter_per_query.
const Sanitized hamming_count_range("hamming_count_range", [] {
  run_one(1, 0, 8, 0, 1, false);     // no codes
  run_one(1, 1, 1, 1, 0, false);     // a single code of one byte; no labels
  run_one(3, 33, 3, 1, 2, true);     // code length that is no multiple of 4 bytes; two words of labels
  run_one(9, 1100, 8, 0, 1, false);  // two groups of queries, two segments of the ranking
  run_one(2, 65, 17, 2, 0, true);    // code length that is no multiple of 4 bytes; no labels
  run_one(1, 40, 145, 0, 1, false);  // so many distances that hamming_range.cu keeps its slots in global memory
  run_one(1, 3, 1156, 4, 2, true);   // the counters of hamming_count are in global memory too
});

}  // namespace
