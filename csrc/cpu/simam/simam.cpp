// simam on the CPU for contiguous planes (NCHW), and the choice between the layouts.
//
// Idea. A plane is read from memory once and stays in the first- or second-level cache for the other passes. The
// forward computes the mean and the deviations from it, 2,048 values at a time, and then the output. The backward takes
// mean and variance from the forward. Its first pass reads x and grad_y, computes the two sums, and stores those terms
// of grad_x that do not depend on the sums: in grad_x or, for half precision, over the widened copy of grad_y. Its
// second pass reads these terms and x, adds the terms that depend on the sums, and writes grad_x. In measurements with
// AVX2, arithmetic was the limit, not memory.
//
// Memory traffic for N elements of s bytes: 2Ns forward and 3Ns backward (the floor) if two planes fit in the caches.
//
// Threads. Each plane is computed by one thread, so results do not depend on the number of threads.
//
// Numerics. Partial sums are computed in float32 (in float64 if x is float64) and merged in float64. Half precision is
// widened to float32 once, into scratch memory. The variance is computed from deviations, so a mean far from zero costs
// no accuracy. A NaN makes its whole plane NaN, as in the plain-torch reference.

#include "hashengine/simam.h"

#include <type_traits>
#include <vector>

#include "cpu/simam/formulas.h"
#include "cpu/simam/layouts.h"
#include "hashengine/element.h"

namespace hashengine {
namespace {

constexpr int64_t kBlock = 2048;  // values of small planes that are processed together
constexpr int64_t kChunk = 2048;  // values that are summed in T, as deviations from the mean of the chunk

// How a plane of at least eight positions is divided into vectors. The first `whole` positions are in consecutive
// vectors. The remaining `rest` positions are in one more vector, which begins at `last`, ends with the plane, and
// overlaps the vector before it; only the lanes in the mask `fresh` are new.
template <typename T>
struct Vectors {
  int64_t whole;
  int64_t rest;
  int64_t last;
  LaneMask<T> fresh{};

  HE_INLINE explicit Vectors(int64_t positions)
      : whole(positions - positions % kLanes), rest(positions % kLanes), last(positions - kLanes) {
    for (int lane = kLanes - int(rest); lane < kLanes; ++lane) fresh[lane] = -1;
  }

  HE_INLINE Lanes<T> only_fresh(Lanes<T> v) const {
    return bit_cast_lanes<Lanes<T>>(bit_cast_lanes<LaneMask<T>>(v) & fresh);
  }
};

// Provides planes in the type of the arithmetic: the planes themselves or, for half precision, copies in scratch memory
// that are widened to float32.
template <typename Element>
class WidePlanes {
 public:
  using T = typename Arithmetic<Element>::Type;
  static constexpr bool kCopies = !std::is_same_v<Element, T>;

  explicit WidePlanes(int64_t values) : scratch_(kCopies ? size_t(values) : 0) {}
  HE_INLINE T* scratch() { return scratch_.data(); }

  HE_INLINE const T* widen(const Element* values, int64_t count) {
    if constexpr (!kCopies) {
      return values;
    } else {
      for (int64_t i = 0; i + kLanes <= count; i += kLanes) store(scratch() + i, load(values + i));
      store(scratch() + count - kLanes, load(values + count - kLanes));
      return scratch();
    }
  }

 private:
  std::vector<T> scratch_;
};

// The moments of `whole` values in consecutive vectors and, if `extra` is not null, of the fresh lanes of the plane's
// last vector, which is at `extra`.
template <typename T>
HE_INLINE Moments<double> chunk_moments(const T* x, int64_t whole, const Vectors<T>& vectors, const T* extra) {
  const double count = double(whole + (extra ? vectors.rest : 0)), inverse = 1 / count;
  Lanes<T> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= whole; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) sums[k] += load(x + i + k * kLanes);
  for (; i < whole; i += kLanes) sums[0] += load(x + i);
  if (extra) sums[1] += vectors.only_fresh(load(extra));
  const T mean = sum_lanes(sum_of(sums)) * T(inverse);

  Lanes<T> deviations[4] = {}, squares[4] = {};
  const auto add = [&](int k, Lanes<T> d) HE_INLINE_LAMBDA {
    deviations[k] += d;
    squares[k] += d * d;
  };
  for (i = 0; i + 4 * kLanes <= whole; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) add(k, load(x + i + k * kLanes) - mean);
  for (; i < whole; i += kLanes) add(0, load(x + i) - mean);
  if (extra) add(1, vectors.only_fresh(load(extra) - mean));
  // This sum would be zero if the mean were not rounded.
  const double sum = double(sum_lanes(sum_of(deviations)));
  return {double(mean) + sum * inverse, double(sum_lanes(sum_of(squares))) - sum * sum * inverse, count};
}

template <typename T>
HE_INLINE Moments<double> plane_moments(const T* x, const Vectors<T>& vectors) {
  const T* extra = vectors.rest ? x + vectors.last : nullptr;
  auto moments = chunk_moments(x, std::min(kChunk, vectors.whole), vectors, extra);
  for (int64_t begin = kChunk; begin < vectors.whole; begin += kChunk) {
    const auto part = chunk_moments<T>(x + begin, std::min(kChunk, vectors.whole - begin), vectors, nullptr);
    moments.merge(part.mean, part.squares, part.count);
  }
  return moments;
}

// The number of planes that are processed together. Small planes are processed several at a time, so that the sums of a
// plane do not wait for the output of the previous plane.
HE_INLINE int64_t block_planes(int64_t positions) { return std::max<int64_t>(kBlock / positions, 1); }

template <typename Element>
struct ForwardPlanes {
  using T = typename Arithmetic<Element>::Type;

  static HE_INLINE void run(const SimamForward& p, int64_t begin, int64_t end) {
    const int64_t positions = p.shape.positions, block = block_planes(positions);
    const double inverse_n = 1 / simam_divisor(positions);
    const Vectors<T> vectors(positions);
    WidePlanes<Element> wide(block * positions);
    for (int64_t first = begin; first < end; first += block) {
      const int64_t planes = std::min(block, end - first);
      const T* x = wide.widen(static_cast<const Element*>(p.x) + first * positions, planes * positions);
      T* stats = static_cast<T*>(p.stats) + 2 * first;
      for (int64_t plane = 0; plane < planes; ++plane) {
        const Moments<double> moments = plane_moments(x + plane * positions, vectors);
        stats[2 * plane] = T(moments.mean);
        stats[2 * plane + 1] = T(moments.squares * inverse_n);
      }
      Element* y = static_cast<Element*>(p.y) + first * positions;
      const Element* ahead = static_cast<const Element*>(p.x) + (first + planes) * positions;  // the next block
      for (int64_t plane = 0; plane < planes; ++plane, x += positions, y += positions, ahead += positions) {
        const auto gate = SimamGate<T, T>::make(stats[2 * plane], stats[2 * plane + 1], p.lam);
        for (int64_t i = 0; i < vectors.whole; i += kLanes) {
          __builtin_prefetch(ahead + i, 0, 2);  // makes the forward of large maps faster
          store(y + i, gate.forward(load(x + i)));
        }
        if (vectors.rest) store(y + vectors.last, gate.forward(load(x + vectors.last)));
      }
    }
  }
};

// The two sums over a plane that the backward needs, of s and of sd = s * d. SimamGate::backward (formulas.h) defines
// s.
struct PlaneSums {
  double s = 0;
  double sd = 0;
};

// The first pass over a plane. Returns the sums, and stores in `direct` those terms of grad_x that do not depend on
// them. `direct` may be the memory of grad_y.
template <typename T>
HE_INLINE PlaneSums backward_plane(const SimamGate<T, T>& gate, const T* grad_y, const T* x, T* direct,
                                   const Vectors<T>& vectors) {
  PlaneSums sums;
  // The last vector overlaps the vector before it, so it is computed first and stored last.
  Lanes<T> s{}, sd{}, last{};
  if (vectors.rest) {
    last = gate.backward(load(grad_y + vectors.last), load(x + vectors.last), s, sd);
    s = vectors.only_fresh(s);
    sd = vectors.only_fresh(sd);
  }
  for (int64_t begin = 0; begin < vectors.whole; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, vectors.whole);
    for (int64_t i = begin; i < end; i += kLanes)
      store(direct + i, gate.backward(load(grad_y + i), load(x + i), s, sd));
    sums.s += double(sum_lanes(s));
    sums.sd += double(sum_lanes(sd));
    s = sd = Lanes<T>{};
  }
  if (vectors.rest) store(direct + vectors.last, last);
  return sums;
}

// The second pass over a plane. Adds the terms that depend on the sums to `direct`, and stores the result in grad_x.
// `direct` may be the memory of grad_x.
template <typename T, typename Element>
HE_INLINE void finish_plane(const SimamGate<T, T>& gate, const PlaneSums& sums, const T* direct, const T* x,
                            Element* grad_x, const Vectors<T>& vectors, int64_t positions) {
  const T mean_s = gate.mean_s(T(sums.s), positions);
  const T slope = gate.slope(T(sums.sd), simam_divisor(positions));
  Lanes<T> last{};
  if (vectors.rest) last = gate.finish(load(direct + vectors.last), load(x + vectors.last), mean_s, slope);
  for (int64_t i = 0; i < vectors.whole; i += kLanes)
    store(grad_x + i, gate.finish(load(direct + i), load(x + i), mean_s, slope));
  if (vectors.rest) store(grad_x + vectors.last, last);
}

template <typename Element>
struct BackwardPlanes {
  using T = typename Arithmetic<Element>::Type;

  static HE_INLINE void run(const SimamBackward& p, int64_t begin, int64_t end) {
    const int64_t positions = p.shape.positions, block = block_planes(positions);
    const Vectors<T> vectors(positions);
    WidePlanes<Element> wide_x(block * positions), wide_grad(block * positions);
    PlaneSums sums[kBlock / kLanes];
    for (int64_t first = begin; first < end; first += block) {
      const int64_t planes = std::min(block, end - first), offset = first * positions;
      const T* x = wide_x.widen(static_cast<const Element*>(p.x) + offset, planes * positions);
      const T* grad_y = wide_grad.widen(static_cast<const Element*>(p.grad_y) + offset, planes * positions);
      Element* grad_x = static_cast<Element*>(p.grad_x) + offset;
      T* direct = wide_grad.scratch();
      if constexpr (std::is_same_v<Element, T>) direct = grad_x;
      const T* stats = static_cast<const T*>(p.stats) + 2 * first;
      const auto gate = [&](int64_t plane) HE_INLINE_LAMBDA {
        return SimamGate<T, T>::make(stats[2 * plane], stats[2 * plane + 1], p.lam);
      };
      for (int64_t plane = 0; plane < planes; ++plane) {
        const int64_t at = plane * positions;
        sums[plane] = backward_plane(gate(plane), grad_y + at, x + at, direct + at, vectors);
      }
      for (int64_t plane = 0; plane < planes; ++plane) {
        const int64_t at = plane * positions;
        finish_plane(gate(plane), sums[plane], direct + at, x + at, grad_x + at, vectors, positions);
      }
    }
  }
};

int64_t row_length(const SimamShape& shape) {
  return shape.layout == FeatureLayout::kContiguous ? shape.positions : shape.channels;
}

template <typename Element>
void forward(const SimamForward& p, SimdLevel level, const ThreadPool& pool) {
  if (row_length(p.shape) < kLanes) return simam_forward_packed<Element>(p, level, pool);
  if (p.shape.layout == FeatureLayout::kChannelsLast) return simam_forward_channels_last<Element>(p, level, pool);
  const int64_t grain = ceil_div(kSimamGrain, p.shape.positions);
  parallel_for(pool, p.shape.samples * p.shape.channels, grain,
               [&](int64_t begin, int64_t end) { run_at_level<ForwardPlanes<Element>>(level, p, begin, end); });
}

template <typename Element>
void backward(const SimamBackward& p, SimdLevel level, const ThreadPool& pool) {
  if (row_length(p.shape) < kLanes) return simam_backward_packed<Element>(p, level, pool);
  if (p.shape.layout == FeatureLayout::kChannelsLast) return simam_backward_channels_last<Element>(p, level, pool);
  const int64_t grain = ceil_div(kSimamGrain, p.shape.positions);
  parallel_for(pool, p.shape.samples * p.shape.channels, grain,
               [&](int64_t begin, int64_t end) { run_at_level<BackwardPlanes<Element>>(level, p, begin, end); });
}

}  // namespace

void simam_forward_cpu(const SimamForward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.shape.dtype, [&](auto element) { return forward<decltype(element)>(p, level, pool); });
}

void simam_backward_cpu(const SimamBackward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.shape.dtype, [&](auto element) { return backward<decltype(element)>(p, level, pool); });
}

}  // namespace hashengine
