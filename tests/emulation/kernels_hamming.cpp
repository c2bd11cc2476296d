#include "hashengine/hamming_cuda.h"

using namespace hashengine;

namespace {

HammingSearch search_of(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter) {
  return {queries, codes, sizes[0], sizes[1], sizes[2], filter, sizes[3]};
}

}  // namespace

extern "C" {

// sizes: queries, codes, bytes of a code, bytes from one query's bitmap to the next.
int64_t workspace_bytes_of_hamming_topk(const int64_t* sizes, int64_t k) {
  return hamming_topk_workspace_bytes(search_of(nullptr, nullptr, sizes, nullptr), k);
}

void hamming_topk(const uint8_t* queries, const uint8_t* codes, const int64_t* sizes, const uint8_t* filter, int64_t k,
                  int32_t* distances, int64_t* positions, void* workspace) {
  launch_hamming_topk(search_of(queries, codes, sizes, filter), k, distances, positions, workspace, nullptr);
}

}  // extern "C"
