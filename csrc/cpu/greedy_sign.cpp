// greedy_sign on the CPU.
//
// Forward reads u once and writes b once (2 * numel * s bytes, the floor); backward reads grad_b and u and writes grad_u
// (3 * numel * s). Both are memory bound, so plain loops that the compiler vectorises are enough.
//
// The penalty is summed over fixed chunks, each in lanes of its own, and the chunks' sums are added in order in double:
// the same bits for every number of threads.

#include "hashengine/greedy_sign.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "hashengine/element.h"

namespace hashengine {
namespace {

constexpr int64_t kChunk = 4096;   // elements a partial sum; at most 4096 / kLanes additions are chained
constexpr int kLanes = 16;         // independent sums, so that the loop vectorises without reassociation
constexpr int64_t kGrainChunks = 8;  // below 32,768 elements a second thread costs more than it saves

// Returns the penalty's sum over the chunk; `has_nan` is only ever raised.
template <typename Element>
double forward_chunk(const Element* u, Element* b, int64_t count, bool& has_nan) {
  using A = Arithmetic<Element>;
  using T = typename A::Type;
  const Element plus = A::store(T(1));
  const Element minus = A::store(T(-1));
  T lanes[kLanes] = {};
  int nans = 0;
  auto step = [&](int64_t i, int lane) {
    const T value = A::load(u[i]);
    b[i] = value >= T(0) ? plus : minus;
    lanes[lane] += greedy_sign_penalty(value);
    nans |= value != value;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) step(i + lane, lane);
  for (int lane = 0; i < count; ++i, ++lane) step(i, lane);
  has_nan |= nans != 0;
  double sum = 0;
  for (T lane : lanes) sum += double(lane);
  return sum;
}

template <typename Element>
bool forward(const GreedySignForward& p, const ThreadPool& pool) {
  const auto* u = static_cast<const Element*>(p.u);
  auto* b = static_cast<Element*>(p.b);
  const int64_t chunks = ceil_div(p.numel, kChunk);
  std::vector<double> sums(static_cast<size_t>(chunks));
  std::atomic<bool> any_nan{false};
  parallel_for(pool, chunks, kGrainChunks, [&](int64_t begin, int64_t end) {
    bool has_nan = false;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t offset = chunk * kChunk;
      const int64_t count = std::min(kChunk, p.numel - offset);
      sums[size_t(chunk)] = forward_chunk(u + offset, b + offset, count, has_nan);
    }
    if (has_nan) any_nan = true;
  });
  double total = 0;
  for (double sum : sums) total += sum;
  // The mean of nothing is NaN, as torch has it.
  const double penalty = p.alpha * (total / double(p.numel));
  if (p.dtype == Dtype::kFloat64) {
    *static_cast<double*>(p.penalty) = penalty;
  } else {
    *static_cast<float*>(p.penalty) = float(penalty);
  }
  return !any_nan;
}

template <typename Element>
void backward(const GreedySignBackward& p, const ThreadPool& pool) {
  using A = Arithmetic<Element>;
  using T = typename A::Type;
  const auto* grad_b = static_cast<const Element*>(p.grad_b);
  const auto* u = static_cast<const Element*>(p.u);
  auto* grad_u = static_cast<Element*>(p.grad_u);
  const bool has_penalty = p.grad_penalty != nullptr;
  const T grad_penalty = has_penalty ? *static_cast<const T*>(p.grad_penalty) : T(0);
  const T scale = T(double(grad_penalty) * p.alpha * 3.0 / double(p.numel));
  parallel_for(pool, p.numel, kChunk * kGrainChunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T straight_through = grad_b ? A::load(grad_b[i]) : T(0);
      grad_u[i] = A::store(has_penalty ? straight_through + scale * greedy_sign_penalty_slope(A::load(u[i])) : straight_through);
    }
  });
}

}  // namespace

bool greedy_sign_forward_cpu(const GreedySignForward& p, const ThreadPool& pool) {
  switch (p.dtype) {
    case Dtype::kFloat64: return forward<double>(p, pool);
    case Dtype::kFloat16: return forward<Float16>(p, pool);
    case Dtype::kBFloat16: return forward<BFloat16>(p, pool);
    default: return forward<float>(p, pool);
  }
}

void greedy_sign_backward_cpu(const GreedySignBackward& p, const ThreadPool& pool) {
  switch (p.dtype) {
    case Dtype::kFloat64: return backward<double>(p, pool);
    case Dtype::kFloat16: return backward<Float16>(p, pool);
    case Dtype::kBFloat16: return backward<BFloat16>(p, pool);
    default: return backward<float>(p, pool);
  }
}

}  // namespace hashengine
