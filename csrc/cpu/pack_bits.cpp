// pack_bits and unpack_bits on the CPU.
//
// Memory traffic. A byte of codes holds the bits of eight elements of s bytes, so pack_bits reads 8s bytes per byte
// that it writes. Every element is read once. Memory bandwidth is the limit.

#include "hashengine/pack_bits.h"

#include <algorithm>
#include <atomic>

#include "cpu/common/lanes.h"

namespace hashengine {
namespace {

constexpr int64_t kGrainBytes = 8192;  // bytes of codes; fewer are not worth a second thread

// Moves bit c of byte r to bit r of byte c.
inline uint64_t transpose_bits(uint64_t x) {
  uint64_t swap = (x ^ (x >> 7)) & 0x00AA00AA00AA00AA;
  x ^= swap ^ (swap << 7);
  swap = (x ^ (x >> 14)) & 0x0000CCCC0000CCCC;
  x ^= swap ^ (swap << 14);
  swap = (x ^ (x >> 28)) & 0x00000000F0F0F0F0;
  return x ^ swap ^ (swap << 28);
}

// Packs eight bytes of codes at a time. Lane i collects the bit of activation i of each of the eight bytes. Transposing
// the 8 x 8 bits then turns the lanes into bytes.
template <typename Element>
struct PackRange {
  using T = typename Arithmetic<Element>::Type;

  static HE_INLINE void run(const PackBits& p, int64_t begin, int64_t end, bool* has_nan) {
    const auto* u = static_cast<const Element*>(p.u);
    LaneMask<T> nans{};
    for (int64_t first = begin; first < end; first += 8) {
      const int count = int(std::min<int64_t>(end - first, 8));
      LaneMask<T> bits{};
      for (int byte = 0; byte < count; ++byte) {
        const Lanes<T> value = load(u + 8 * (first + byte));
        bits |= (value >= T(0)) & (LaneIndex<T>(1) << byte);
        nans |= value != value;
      }
      // Activation 0 becomes the most significant bit of a byte of codes, so its lane goes to the last byte of `word`.
      uint64_t word = 0;
      for (int lane = 0; lane < kLanes; ++lane) word |= uint64_t(bits[lane]) << (8 * (7 - lane));
      word = transpose_bits(word);
      for (int byte = 0; byte < count; ++byte) p.codes[first + byte] = uint8_t(word >> (8 * byte));
    }
    for (int lane = 0; lane < kLanes; ++lane) *has_nan |= nans[lane] != 0;
  }
};

template <typename Element>
bool pack(const PackBits& p, SimdLevel level, const ThreadPool& pool) {
  std::atomic<bool> any_nan{false};
  parallel_for(pool, p.bytes, kGrainBytes, [&](int64_t begin, int64_t end) {
    bool has_nan = false;
    run_at_level<PackRange<Element>>(level, p, begin, end, &has_nan);
    if (has_nan) any_nan = true;
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

bool pack_bits_cpu(const PackBits& p, SimdLevel level, const ThreadPool& pool) {
  if (p.dtype == Dtype::kBool) {
    pack_bools(p, pool);
    return true;
  }
  return with_element(p.dtype, [&](auto element) { return pack<decltype(element)>(p, level, pool); });
}

void unpack_bits_cpu(const UnpackBits& p, const ThreadPool& pool) {
  parallel_for(pool, p.bytes, kGrainBytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int bit = 0; bit < 8; ++bit) p.bits[8 * i + bit] = (p.codes[i] >> (7 - bit)) & 1;
  });
}

}  // namespace hashengine
