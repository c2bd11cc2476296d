// Inference of triplet attention where a sample fits into the shared memory of a cluster: one launch, no workspace. See
// triplet_resident.cu.
#pragma once

#include "hashengine/triplet_attention.h"

namespace hashengine {

bool triplet_is_resident(const TripletShape& shape);
// width: of vectors along A2, for rows of y.
void launch_triplet_resident(const TripletInference& params, int width, cudaStream_t stream);

}  // namespace hashengine
