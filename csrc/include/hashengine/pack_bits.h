// pack_bits: eight activations to a byte, the first in the most significant bit. A bit is set where u >= 0, or, for
// bool, as it is. Rows are whole bytes, so a contiguous [N, bits] packs as one run of numel / 8 bytes.
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

// codes: [bytes]; bits: [8 * bytes], 0 or 1 each.
struct UnpackBits {
  const uint8_t* codes;
  bool* bits;
  int64_t bytes;
};

// Returns false where u holds a NaN, which has no sign.
bool pack_bits_cpu(const PackBits& params, SimdLevel level, const ThreadPool& pool);
void unpack_bits_cpu(const UnpackBits& params, const ThreadPool& pool);

void launch_pack_bits(const PackBits& params, cudaStream_t stream);
void launch_unpack_bits(const UnpackBits& params, cudaStream_t stream);

}  // namespace hashengine
