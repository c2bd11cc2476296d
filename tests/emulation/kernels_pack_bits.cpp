#include "hashengine/pack_bits.h"

using namespace hashengine;

extern "C" {

void pack_bits(const void* u, uint8_t* codes, int64_t bytes, int dtype) {
  launch_pack_bits({u, codes, bytes, Dtype(dtype)}, nullptr);
}

void unpack_bits(const uint8_t* codes, bool* bits, int64_t bytes) { launch_unpack_bits({codes, bits, bytes}, nullptr); }

}  // extern "C"
