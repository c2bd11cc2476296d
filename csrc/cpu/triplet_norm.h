// BatchNorm and sigmoid of triplet attention, on one sample's padded or saved maps, row by row.
#pragma once

#include <cmath>

#include "triplet_layout.h"

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
TripletNorm<T> triplet_norm(const TripletParameters& parameters, int branch, T mean, T var) {
  const T weight = *static_cast<const T*>(parameters.bn_weight[branch]);
  const T bias = *static_cast<const T*>(parameters.bn_bias[branch]);
  return {mean, T(1) / std::sqrt(var + T(parameters.eps)), weight, bias};
}

// Number, mean and sum of squared distances from it, put together by Chan, Golub and LeVeque's formula.
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

// A sum over vectors in double, of chains in T.
template <typename T>
class ChainedSum {
 public:
  HE_INLINE void add(Lanes<T> value) {
    chain_ += value;
    if (++length_ == kLongest) end_chain();
  }
  HE_INLINE double value() {
    end_chain();
    return sum_lanes(total_);
  }

 private:
  static constexpr int kLongest = 16;

  HE_INLINE void end_chain() {
    total_ += __builtin_convertvector(chain_, Lanes<double>);
    chain_ = Lanes<T>{};
    length_ = 0;
  }

  Lanes<T> chain_ = {};
  Lanes<double> total_ = {};
  int length_ = 0;
};

// Of rows of whole vectors, in two passes; squares are taken around the mean as T has it, which is off by next to
// nothing.
template <typename T>
HE_INLINE TripletMoments measure(const T* rows_begin, int64_t pitch, int64_t rows, int64_t columns) {
  const double count = double(rows * columns);
  ChainedSum<T> sum, squares;
  for (int64_t row = 0; row < rows; ++row)
    for_row(columns, kPadded, [&](int64_t column, auto part) HE_INLINE_LAMBDA {
      sum.add(keep<T>(load(rows_begin + row * pitch + column), Lanes<T>{}, part));
    });
  const double mean = sum.value() / count;
  const T center = T(mean);
  for (int64_t row = 0; row < rows; ++row)
    for_row(columns, kPadded, [&](int64_t column, auto part) HE_INLINE_LAMBDA {
      const Lanes<T> distance = keep<T>(load(rows_begin + row * pitch + column) - center, Lanes<T>{}, part);
      squares.add(distance * distance);
    });
  return {count, mean, squares.value()};
}

// to[row][column] = gate * scale, padded, for the rows `rows` of a map whose response is saved without padding.
template <typename T>
HE_INLINE void gate_rows(const T* response, const TripletMap& map, Range rows, TripletNorm<T> norm, T scale, T* to) {
  const int64_t columns = map.columns, pitch = map.pitch();
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for_row(columns, map.rows - row, [&](int64_t column, auto part) HE_INLINE_LAMBDA {
      const Lanes<T> normal = norm.normal(load(response + row * columns + column, part));
      store(to + row * pitch + column, norm.gate(normal) * scale);
    });
}

// The gradients of BatchNorm's bias and weight, not yet added up over the batch.
struct AffineSums {
  double bias = 0;
  double weight = 0;
};

// Turns the sums of grad_y * x into the gradient of BatchNorm's result, in place.
template <typename T>
HE_INLINE AffineSums affine_rows(T* sums, const T* response, const TripletMap& map, Range rows, TripletNorm<T> norm,
                                 T scale) {
  const int64_t columns = map.columns, pitch = map.pitch();
  ChainedSum<T> bias, weight;
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for_row(columns, map.rows - row, [&](int64_t column, auto part) HE_INLINE_LAMBDA {
      const Lanes<T> normal = norm.normal(load(response + row * columns + column, part));
      const Lanes<T> gate = norm.gate(normal);
      const Lanes<T> gradient = load(sums + row * pitch + column) * scale * (gate * (1 - gate));
      store(sums + row * pitch + column, gradient);
      bias.add(keep<T>(gradient, Lanes<T>{}, part));
      weight.add(keep<T>(gradient * normal, Lanes<T>{}, part));
    });
  return {bias.value(), weight.value()};
}

// The gradient of the convolution's result from that of BatchNorm's. The batch's own mean and variance depend on every
// response: there the mean gradient and the mean of gradient * normal go off.
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
