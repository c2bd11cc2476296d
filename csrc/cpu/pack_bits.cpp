// pack_bits on the CPU: reads 8 * s bytes and writes one, memory bound; nothing is read twice.

#include "hashengine/pack_bits.h"

#include <atomic>

#include "hashengine/element.h"

namespace hashengine {
namespace {

constexpr int64_t kGrainBytes = 8192;

template <typename Element>
bool pack(const PackBits& p, const ThreadPool& pool) {
  using A = Arithmetic<Element>;
  const auto* u = static_cast<const Element*>(p.u);
  std::atomic<bool> any_nan{false};
  parallel_for(pool, p.bytes, kGrainBytes, [&](int64_t begin, int64_t end) {
    int nans = 0;
    for (int64_t i = begin; i < end; ++i) {
      unsigned code = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const auto value = A::load(u[8 * i + bit]);
        code |= unsigned(value >= 0) << (7 - bit);
        nans |= value != value;
      }
      p.codes[i] = uint8_t(code);
    }
    if (nans) any_nan = true;
  });
  return !any_nan;
}

void pack_bools(const PackBits& p, const ThreadPool& pool) {
  const auto* u = static_cast<const uint8_t*>(p.u);
  parallel_for(pool, p.bytes, kGrainBytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      unsigned code = 0;
      for (int bit = 0; bit < 8; ++bit) code |= unsigned(u[8 * i + bit] != 0) << (7 - bit);
      p.codes[i] = uint8_t(code);
    }
  });
}

}  // namespace

bool pack_bits_cpu(const PackBits& p, const ThreadPool& pool) {
  switch (p.dtype) {
    case Dtype::kFloat64: return pack<double>(p, pool);
    case Dtype::kFloat32: return pack<float>(p, pool);
    case Dtype::kFloat16: return pack<Float16>(p, pool);
    case Dtype::kBFloat16: return pack<BFloat16>(p, pool);
    case Dtype::kBool: break;
  }
  pack_bools(p, pool);
  return true;
}

void unpack_bits_cpu(const UnpackBits& p, const ThreadPool& pool) {
  parallel_for(pool, p.bytes, kGrainBytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int bit = 0; bit < 8; ++bit) p.bits[8 * i + bit] = (p.codes[i] >> (7 - bit)) & 1;
  });
}

}  // namespace hashengine
