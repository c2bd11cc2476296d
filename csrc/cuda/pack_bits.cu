// pack_bits and unpack_bits on the GPU. Packing turns eight activations into a byte, the first into the most
// significant bit; unpacking is the inverse.
//
// Idea. A byte is packed by one thread from eight elements, which it loads in 128-bit pieces (bool: in one 64-bit
// piece). An element costs a conversion, a comparison and a select. The threads exchange nothing. (A ballot would save
// the select, but it needs one element per lane and therefore narrow loads. It also puts the first lane in the LEAST
// significant bit, so the bits would have to be reversed.) Unpacking spreads four bits with one multiplication.
//
// Traffic, for B bytes of codes and s bytes per element. Packing reads 8Bs and writes B; unpacking reads B and writes
// 8B. Both are the floor: nothing is moved twice.
//
// Launch. 256 threads per block. A thread packs one to four bytes, with 32 bytes of activations in flight (64 of
// float64), or unpacks four bytes. Each block processes one tile. One kernel, no scratch. Activations that are not
// aligned to their vector are read one at a time.
//
// Limits. At most 2^31 - 1 blocks, each with at least 256 bytes of codes. NaN packs as 0; the kernel does not report
// it.

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "hashengine/pack_bits.h"

namespace hashengine {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kUnpackedBytes = 4;  // the bytes of codes that a thread unpacks

// The bytes of codes that a thread packs. It then has 32 bytes of activations in flight, or 64 of float64.
template <typename T>
constexpr int kPackedBytes = sizeof(T) < 4 ? 4 / sizeof(T) : 1;

__device__ __forceinline__ bool is_set(uint8_t value) { return value != 0; }

template <typename T>
__device__ __forceinline__ bool is_set(T value) {
  return widen(value) >= Arithmetic<T>(0);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kBlockThreads) pack_kernel(const T* u, uint8_t* codes, int64_t bytes) {
  constexpr int kVectors = 8 / kWidth;
  constexpr int kBytes = kPackedBytes<T>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockThreads * kBytes + threadIdx.x;

  Vector<T, kWidth> vectors[kBytes][kVectors];
#pragma unroll
  for (int k = 0; k < kBytes; ++k) {  // issues all loads before the first use
    const int64_t byte = first + k * kBlockThreads;
    if (byte >= bytes) break;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) vectors[k][v] = vector_at<kWidth>(u, 8 * byte + v * kWidth);
  }
#pragma unroll
  for (int k = 0; k < kBytes; ++k) {
    const int64_t byte = first + k * kBlockThreads;
    if (byte >= bytes) break;
    unsigned code = 0;
#pragma unroll
    for (int bit = 0; bit < 8; ++bit)
      if (is_set(vectors[k][bit / kWidth].at[bit % kWidth])) code |= 0x80u >> bit;
    codes[byte] = static_cast<uint8_t>(code);
  }
}

// Spreads four bits to four bytes; the byte of the most significant bit is the first in memory.
__device__ __forceinline__ uint32_t spread_bits(uint32_t nibble) {
  // The product adds up copies of the nibble, shifted by 0, 9, 18 and 27 bits: bit 8j + 3 of the product is bit 3 - j
  // of the nibble.
  return (nibble * 0x08040201u >> 3) & 0x01010101u;
}

template <bool kAligned>
__global__ void __launch_bounds__(kBlockThreads) unpack_kernel(const uint8_t* codes, uint8_t* bits, int64_t bytes) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockThreads * kUnpackedBytes + threadIdx.x;
  uint32_t loaded[kUnpackedBytes];
#pragma unroll
  for (int k = 0; k < kUnpackedBytes; ++k) {
    const int64_t byte = first + k * kBlockThreads;
    loaded[k] = byte < bytes ? codes[byte] : 0u;
  }
#pragma unroll
  for (int k = 0; k < kUnpackedBytes; ++k) {
    const int64_t byte = first + k * kBlockThreads;
    if (byte >= bytes) break;
    const uint32_t code = loaded[k];
    if constexpr (kAligned) {
      *reinterpret_cast<uint2*>(bits + 8 * byte) = make_uint2(spread_bits(code >> 4), spread_bits(code & 15));
    } else {
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) bits[8 * byte + bit] = code >> (7 - bit) & 1;
    }
  }
}

template <typename T>
void launch_pack(const PackBits& params, cudaStream_t stream) {
  constexpr int kWidth = std::min<int>(8, kVectorBytes / sizeof(T));
  constexpr int kTileBytes = kBlockThreads * kPackedBytes<T>;
  const bool aligned = is_aligned(params.u, kWidth * sizeof(T));
  const auto kernel = aligned ? pack_kernel<T, kWidth> : pack_kernel<T, 1>;
  launch(kernel, ceil_div<int64_t>(params.bytes, kTileBytes), kBlockThreads, stream, static_cast<const T*>(params.u),
         params.codes, params.bytes);
}

}  // namespace

void launch_pack_bits(const PackBits& params, cudaStream_t stream) {
  if (params.bytes == 0) return;
  if (params.dtype == Dtype::kBool) return launch_pack<uint8_t>(params, stream);
  with_floating_type(params.dtype, [&](auto tag) { launch_pack<typename decltype(tag)::Type>(params, stream); });
}

void launch_unpack_bits(const UnpackBits& params, cudaStream_t stream) {
  if (params.bytes == 0) return;
  auto* bits = reinterpret_cast<uint8_t*>(params.bits);
  const auto kernel = is_aligned(bits, 8) ? unpack_kernel<true> : unpack_kernel<false>;
  launch(kernel, ceil_div<int64_t>(params.bytes, kBlockThreads * kUnpackedBytes), kBlockThreads, stream, params.codes,
         bits, params.bytes);
}

}  // namespace hashengine
