#include "hashengine/triplet_attention_update.h"

namespace hashengine {

void triplet_update_cpu(const TripletUpdate& p) {
  for (int branch = 0; branch < p.branches; ++branch) {
    if (p.dtype == Dtype::kFloat64) {
      triplet_update_branch<double>(p, branch);
    } else {
      triplet_update_branch<float>(p, branch);
    }
  }
}

}  // namespace hashengine
