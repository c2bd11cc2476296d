#pragma once

#include "hashengine/triplet_attention.h"

// Converts the array that the Python tests pass, which has the order N, C, H, W, branches, kernel_size, layout, dtype.
inline hashengine::TripletShape triplet_shape(const int64_t* values) {
  return {values[0],
          values[1],
          values[2],
          values[3],
          int(values[4]),
          int(values[5]),
          hashengine::FeatureLayout(values[6]),
          hashengine::Dtype(values[7])};
}
