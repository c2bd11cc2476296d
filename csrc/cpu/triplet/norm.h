// BatchNorm and sigmoid of triplet attention, on the rows of one sample's maps. Some of these maps are padded
// (PaddedMaps in maps.h, and the convolution's results), others are not.
#pragma once

#include <cmath>

#include "cpu/triplet/layout.h"

namespace hashengine {

// gate = sigmoid((response - mean) * rstd * weight + bias)
template <typename T>
struct TripletNorm {
  T mean;
  T rstd;
  T weight;
  T bias;

  HE_INLINE Lanes<T> normal(Lanes<T> response) const { return (response - mean) * rstd; }
  HE_INLINE Lanes<T> gate(Lanes<T> normal) const { return sigmoid_lanes<Lanes<T>>(normal * weight + bias); }
};

template <typename T>
TripletNorm<T> make_norm(const TripletParameters& parameters, int branch, T mean, T var) {
  const T weight = *static_cast<const T*>(parameters.bn_weight[branch]);
  const T bias = *static_cast<const T*>(parameters.bn_bias[branch]);
  return {mean, T(1) / std::sqrt(var + T(parameters.eps)), weight, bias};
}

// Count, mean and sum of squared deviations of a set of values. Sets are merged by the formula of Chan, Golub and
// LeVeque.
struct TripletMoments {
  double count = 0;
  double mean = 0;
  double squares = 0;

  void add(const TripletMoments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, difference = other.mean - mean;
    mean += difference * (other.count / total);
    squares += other.squares + difference * difference * (count * (other.count / total));
    count = total;
  }
};

// A sum of vectors: chains of additions in T, whose results are added in float64.
template <typename T>
class ChainedSum {
 public:
  HE_INLINE void add(Lanes<T> value) {
    chain_ += value;
    if (++length_ == kChainLength) end_chain();
  }
  HE_INLINE double value() {
    end_chain();
    return sum_lanes(total_);
  }

 private:
  static constexpr int kChainLength = 16;

  HE_INLINE void end_chain() {
    total_ += __builtin_convertvector(chain_, Lanes<double>);
    chain_ = Lanes<T>{};
    length_ = 0;
  }

  Lanes<T> chain_ = {};
  Lanes<double> total_ = {};
  int length_ = 0;
};

// The moments of padded rows, in two passes. Deviations are taken from the mean rounded to T, which changes their sum
// of squares negligibly.
template <typename T>
HE_INLINE TripletMoments moments_of_rows(const T* rows_begin, int64_t pitch, int64_t rows, int64_t columns) {
  const double count = double(rows * columns);
  ChainedSum<T> sum, squares;
  for (int64_t row = 0; row < rows; ++row)
    for_row(columns, kPaddedRows, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
      sum.add(keep_lanes<T>(load(rows_begin + row * pitch + column), Lanes<T>{}, extent));
    });
  const double mean = sum.value() / count;
  const T center = T(mean);
  for (int64_t row = 0; row < rows; ++row)
    for_row(columns, kPaddedRows, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
      const Lanes<T> distance = keep_lanes<T>(load(rows_begin + row * pitch + column) - center, Lanes<T>{}, extent);
      squares.add(distance * distance);
    });
  return {count, mean, squares.value()};
}

// to[row][column] = gate * scale for rows `rows` of a map. `to` is padded, `response` is not.
template <typename T>
HE_INLINE void gate_rows(const T* response, const TripletMap& map, Range rows, TripletNorm<T> norm, T scale, T* to) {
  const int64_t columns = map.columns, pitch = map.pitch();
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for_row(columns, map.rows - row, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
      const Lanes<T> normal = norm.normal(load(response + row * columns + column, extent));
      store(to + row * pitch + column, norm.gate(normal) * scale);
    });
}

// The gradients of BatchNorm's bias and weight, summed over some or all values of a branch's maps.
struct AffineSums {
  double bias = 0;
  double weight = 0;
};

// The backward of the gate, in place: replaces the sums of grad_y * x by the gradient of BatchNorm's output. Returns
// the gradients of BatchNorm's bias and weight, summed over the given rows.
template <typename T>
HE_INLINE AffineSums gate_backward_rows(T* sums, const T* response, const TripletMap& map, Range rows,
                                        TripletNorm<T> norm, T scale) {
  const int64_t columns = map.columns, pitch = map.pitch();
  ChainedSum<T> bias, weight;
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for_row(columns, map.rows - row, [&](int64_t column, auto extent) HE_INLINE_LAMBDA {
      const Lanes<T> normal = norm.normal(load(response + row * columns + column, extent));
      const Lanes<T> gate = norm.gate(normal);
      const Lanes<T> gradient = load(sums + row * pitch + column) * scale * (gate * (1 - gate));
      store(sums + row * pitch + column, gradient);
      bias.add(keep_lanes<T>(gradient, Lanes<T>{}, extent));
      weight.add(keep_lanes<T>(gradient * normal, Lanes<T>{}, extent));
    });
  return {bias.value(), weight.value()};
}

// The backward of BatchNorm: computes the gradient of its input (the convolution's output) from the gradient of its
// output. Batch statistics depend on every response, which adds two terms: one with mean_gradient, the mean of
// `gradient`, and one with mean_product, the mean of gradient * normal. With running statistics both means are zero.
template <typename T>
struct NormBackward {
  TripletNorm<T> norm;
  T mean_gradient = 0;
  T mean_product = 0;

  HE_INLINE Lanes<T> operator()(Lanes<T> gradient, Lanes<T> response) const {
    return (gradient - mean_gradient - norm.normal(response) * mean_product) * (norm.rstd * norm.weight);
  }
};

}  // namespace hashengine
