// Triplet attention's pooling on the GPU: the maximum and the mean over each axis in one pass over x. See
// triplet_reduce.cuh.

#include "triplet_reduce.cuh"

namespace hashengine {
namespace {

template <typename T>
struct PoolSource {
  using Element = T;
  using Value = T;
  static constexpr bool kHasMaximum = true;
  const T* x;

  template <int kWidth>
  __device__ __forceinline__ Vector<T, kWidth> load(int64_t offset) const {
    return vector_at<kWidth>(x, offset);
  }
};

}  // namespace

template <typename Real>
void launch_triplet_pool(const void* x, Dtype dtype, const TripletGeometry& geometry, const TripletCut& cut,
                         const AxisMaps<Real>& maps, cudaStream_t stream) {
  with_element<Real>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_triplet_reduce(PoolSource<T>{static_cast<const T*>(x)}, geometry, cut, maps, stream);
  });
}

template void launch_triplet_pool(const void*, Dtype, const TripletGeometry&, const TripletCut&, const AxisMaps<float>&,
                                  cudaStream_t);
template void launch_triplet_pool(const void*, Dtype, const TripletGeometry&, const TripletCut&,
                                  const AxisMaps<double>&, cudaStream_t);

}  // namespace hashengine
