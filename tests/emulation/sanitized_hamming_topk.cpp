#include <cstdlib>

#include "cuda/hamming/topk_steps.h"
#include "sanitized.h"

extern "C" void emulation_set_capability(int capability);

using namespace hashengine;

namespace {

void run_one(int capability, int64_t queries, int64_t codes, int64_t code_bytes, int64_t offset, int64_t k,
             bool filter_per_query, bool is_selective = false) {
  emulation_set_capability(capability);
  const int64_t filter_bytes = ceil_div<int64_t>(codes, 8);
  Array query_rows(queries * code_bytes, offset), code_rows(codes * code_bytes, offset);
  Array filter((filter_per_query ? queries : 1) * filter_bytes, 0, is_selective ? 0 : 0x7f);
  std::srand(1);
  for (int64_t i = 0; i < queries * code_bytes; ++i) query_rows.get<uint8_t>()[i] = uint8_t(std::rand());
  for (int64_t i = 0; i < codes * code_bytes; ++i) code_rows.get<uint8_t>()[i] = uint8_t(std::rand());
  for (int64_t i = filter_bytes - 1; is_selective && i >= 0; i -= 300) filter.get<uint8_t>()[i] = 1;
  const HammingSearch search{query_rows.get<uint8_t>(), code_rows.get<uint8_t>(),           queries, codes, code_bytes,
                             filter.get<uint8_t>(),     filter_per_query ? filter_bytes : 0};
  Array workspace(hamming_topk_workspace_bytes(search, k), 0);
  Array distances(4 * queries * k, 0), positions(8 * queries * k, 0);
  launch_hamming_topk(search, k, distances.get<int32_t>(), positions.get<int64_t>(), workspace.get(), nullptr);
  emulation_set_capability(90);
}

// Arguments: capability, queries, codes, code_bytes, offset, k, filter_per_query, is_selective. The comments name the
// scan that runs.
const Sanitized hamming_topk("hamming_topk", [] {
  run_one(90, 2, 1, 1, 1, 1, false);     // a single code of one byte
  run_one(90, 3, 500, 9, 0, 500, true);  // no scan; k is the number of codes
  for (int capability : {80, 90, 120}) {
    run_one(capability, 1, 8201, 8, 0, 5, false);   // scan_popcount
    run_one(capability, 3, 8193, 13, 1, 40, true);  // scan_mma (on 12.0, scan_popcount); partial words
  }
  run_one(90, 161, 8195, 8, 0, 3, true);    // scan_wgmma; a row is one slice (bit_rows.cuh)
  run_one(90, 160, 8193, 32, 0, 7, false);  // scan_wgmma; a row is several slices
  run_one(90, 37, 8193, 8, 0, 7, false);    // scan_mma; more queries than it compares at a time
  run_one(80, 2, 8193, 128, 4, 7, false);   // scan_mma; the longest codes that it supports
  run_one(90, 1, 8193, 140, 0, 7, true);    // scan_popcount, the kernel for codes of more than 32 words
  for (int64_t codes : {8193, 8224})        // scan_own_filter; rows of 1,025 and of 1,028 bytes
    run_one(90, 3, codes, 8, 0, 7, true, true);
});

}  // namespace
