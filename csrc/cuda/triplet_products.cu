// The sums of dy x over each axis in one pass over both: what the gradients of triplet attention's gates are made of.
// See triplet_reduce.cuh.

#include "triplet_reduce.cuh"

namespace hashengine {
namespace {

template <typename T>
struct ProductSource {
  using Element = T;
  using Value = Arithmetic<T>;
  static constexpr bool kHasMaximum = false;
  const T* x;
  const T* grad_y;

  template <int kWidth>
  __device__ __forceinline__ Vector<Value, kWidth> load(int64_t offset) const {
    const Vector<T, kWidth> factors = vector_at<kWidth>(x, offset), gradients = vector_at<kWidth>(grad_y, offset);
    Vector<Value, kWidth> products;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) products.at[i] = widen(factors.at[i]) * widen(gradients.at[i]);
    return products;
  }
};

}  // namespace

template <typename Real>
void launch_triplet_products(const void* x, const void* grad_y, Dtype dtype, const TripletGeometry& geometry,
                             const TripletCut& cut, const AxisMaps<Real>& maps, cudaStream_t stream) {
  with_element<Real>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_triplet_reduce(ProductSource<T>{static_cast<const T*>(x), static_cast<const T*>(grad_y)}, geometry, cut,
                          maps, stream);
  });
}

template void launch_triplet_products(const void*, const void*, Dtype, const TripletGeometry&, const TripletCut&,
                                      const AxisMaps<float>&, cudaStream_t);
template void launch_triplet_products(const void*, const void*, Dtype, const TripletGeometry&, const TripletCut&,
                                      const AxisMaps<double>&, cudaStream_t);

}  // namespace hashengine
