// pack_bits: packs eight activations into a byte, the first into the most significant bit. The bit of a floating-point
// activation is 1 if the activation is >= 0; the bit of a bool is 1 if the bool is true. The length of a row is a
// multiple of 8. The rows of a contiguous tensor can therefore be packed as one array.
#pragma once

#include "hashengine/parallel.h"
#include "hashengine/simd_level.h"
#include "hashengine/types.h"

namespace hashengine {

// u: [8 * bytes] of dtype, contiguous; codes: [bytes].
struct PackBits {
  const void* u;
  uint8_t* codes;
  int64_t bytes;
  Dtype dtype;
};

// codes: [bytes]; bits: [8 * bytes].
struct UnpackBits {
  const uint8_t* codes;
  bool* bits;
  int64_t bytes;
};

// Returns false if u contains a NaN, which has no sign.
bool pack_bits_cpu(const PackBits& params, SimdLevel level, const ThreadPool& pool);
void unpack_bits_cpu(const UnpackBits& params, const ThreadPool& pool);

void launch_pack_bits(const PackBits& params, cudaStream_t stream);
void launch_unpack_bits(const UnpackBits& params, cudaStream_t stream);

}  // namespace hashengine
