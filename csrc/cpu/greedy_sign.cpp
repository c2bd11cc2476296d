// greedy_sign on the CPU.
//
// Memory traffic for N elements of s bytes. Forward: 2Ns, the floor (reads u, writes b). Backward: 3Ns, the floor
// (reads grad_b and u, writes grad_u), or 2Ns if there is no grad_b. The code does not branch on signs, because they
// cannot be predicted.
//
// Order of sums. The penalty is summed in chunks of fixed size, and the sums of the chunks are added in order, in
// float64. Therefore the result has the same bits for every number of threads.

#include "hashengine/greedy_sign.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/common/lanes.h"

namespace hashengine {
namespace {

constexpr int64_t kChunk = 2048;   // elements per partial sum, a chain of 256 additions per lane
constexpr int64_t kGrain = 32768;  // elements; fewer are not worth a second thread

// Calls step(i, vector of u[i] to u[i + 7], number of lanes) for every eight elements. The last vector may have fewer
// lanes.
template <typename Element, typename Step>
HE_INLINE void for_lanes(const Element* u, int64_t count, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) step(i, load(u + i), kLanes);
  if (i < count) step(i, load_first(u + i, int(count - i)), int(count - i));
}

template <typename Element, typename Vector>
HE_INLINE void store_lanes(Element* to, Vector value, int count) {
  count == kLanes ? store(to, value) : store_first(to, value, count);
}

template <typename Element>
struct ForwardChunks {
  using T = typename Arithmetic<Element>::Type;

  // Writes b, and the sum of each chunk's penalties to sums[chunk]. Sets *has_nan if u contains a NaN.
  static HE_INLINE void run(const GreedySignForward& p, int64_t begin, int64_t end, double* sums, bool* has_nan) {
    LaneMask<T> nans{};
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t offset = chunk * kChunk, count = std::min(kChunk, p.numel - offset);
      const Element* u = static_cast<const Element*>(p.u) + offset;
      Element* b = static_cast<Element*>(p.b) + offset;
      Lanes<T> sum{};
      for_lanes(u, count, [&](int64_t i, Lanes<T> value, int lanes) HE_INLINE_LAMBDA {
        store_lanes(b + i, value >= T(0) ? broadcast(T(1)) : broadcast(T(-1)), lanes);
        const Lanes<T> distance = abs_lanes(abs_lanes(value) - T(1));
        Lanes<T> penalty = distance * distance * distance;
        if (lanes < kLanes) penalty = lane_numbers<LaneMask<T>>() < lanes ? penalty : Lanes<T>{};
        sum += penalty;
        nans |= value != value;
      });
      sums[chunk] = double(sum_lanes(sum));
    }
    for (int lane = 0; lane < kLanes; ++lane) *has_nan |= nans[lane] != 0;
  }
};

template <typename Element>
bool forward(const GreedySignForward& p, SimdLevel level, const ThreadPool& pool) {
  const int64_t chunks = ceil_div(p.numel, kChunk);
  std::vector<double> sums(static_cast<size_t>(chunks));
  std::atomic<bool> any_nan{false};
  parallel_for(pool, chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    bool has_nan = false;
    run_at_level<ForwardChunks<Element>>(level, p, begin, end, sums.data(), &has_nan);
    if (has_nan) any_nan = true;
  });
  double total = 0;
  for (double sum : sums) total += sum;
  // The mean of an empty tensor is NaN, as in torch.
  const double penalty = p.alpha * (total / double(p.numel));
  if (p.dtype == Dtype::kFloat64) {
    *static_cast<double*>(p.penalty) = penalty;
  } else {
    *static_cast<float*>(p.penalty) = float(penalty);
  }
  return !any_nan;
}

// kHasCode, kHasPenalty: whether grad_b and grad_penalty are given. A missing gradient counts as zero.
template <typename Element, bool kHasCode, bool kHasPenalty>
struct BackwardRange {
  using T = typename Arithmetic<Element>::Type;

  static HE_INLINE void run(const GreedySignBackward& p, int64_t begin, int64_t end) {
    const auto* u = static_cast<const Element*>(p.u);
    const auto* grad_b = static_cast<const Element*>(p.grad_b);
    auto* grad_u = static_cast<Element*>(p.grad_u);
    T scale = 0;
    if constexpr (kHasPenalty)
      scale = T(double(*static_cast<const T*>(p.grad_penalty)) * p.alpha * 3.0 / double(p.numel));
    for_lanes(u + begin, end - begin, [&](int64_t i, Lanes<T> value, int lanes) HE_INLINE_LAMBDA {
      const int64_t at = begin + i;
      Lanes<T> grad{};
      if constexpr (kHasCode) grad = lanes == kLanes ? load(grad_b + at) : load_first(grad_b + at, lanes);
      if constexpr (kHasPenalty) {
        const Lanes<T> excess = abs_lanes(value) - T(1);
        const Lanes<T> slope = excess * abs_lanes(excess);
        // value * slope is 0 if value is 0, and NaN if value is NaN.
        grad += scale * (value > 0 ? slope : (value < 0 ? -slope : value * slope));
      }
      store_lanes(grad_u + at, grad, lanes);
    });
  }
};

template <typename Element, bool kHasCode, bool kHasPenalty>
void backward_range(const GreedySignBackward& p, SimdLevel level, const ThreadPool& pool) {
  parallel_for(pool, p.numel, kGrain, [&](int64_t begin, int64_t end) {
    run_at_level<BackwardRange<Element, kHasCode, kHasPenalty>>(level, p, begin, end);
  });
}

template <typename Element>
void backward(const GreedySignBackward& p, SimdLevel level, const ThreadPool& pool) {
  const auto run =
      p.grad_b ? (p.grad_penalty ? backward_range<Element, true, true> : backward_range<Element, true, false>)
               : (p.grad_penalty ? backward_range<Element, false, true> : backward_range<Element, false, false>);
  run(p, level, pool);
}

}  // namespace

bool greedy_sign_forward_cpu(const GreedySignForward& p, SimdLevel level, const ThreadPool& pool) {
  return with_element(p.dtype, [&](auto element) { return forward<decltype(element)>(p, level, pool); });
}

void greedy_sign_backward_cpu(const GreedySignBackward& p, SimdLevel level, const ThreadPool& pool) {
  with_element(p.dtype, [&](auto element) { backward<decltype(element)>(p, level, pool); });
}

}  // namespace hashengine
