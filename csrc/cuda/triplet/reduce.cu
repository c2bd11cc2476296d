// The reduce pass: one pass over x that reduces it along each of its axes A0, A1 and A2. The results along an axis are
// "the map" of that axis. triplet_attention and triplet_pool need the maximum and the sum of x; the gradients of the
// gates need the sum of x * dy. tiles.cuh defines the axes, tile, slice, position and slot.
//
// Idea. A thread loads one vector in each of several rows of a slice, and uses it from registers three times: for the
// reduction along A0 of its positions, which stays in registers; for its columns (A1), over its rows; and for its rows
// (A2), over the elements of each vector. The results for columns and rows go to shared memory. There, once per stage,
// that is, for several slices together, threads merge them along each column and each row. If a tile does not span an
// axis, the map of that axis is left in parts. The kernel that reads the map merges the parts in their order.
//
// Traffic, for N elements of s bytes. Reads Ns (2Ns with dy), the floor. Writes one partial map per axis and part: for
// a tile of 56 x 56 x 56 elements, 3 * 56^2 values of two Reals each (one with dy). The next kernel finds them in L2.
//
// Instructions, for samples of 256 x 56 x 56 in NCHW: the pool takes about 12 per element for bfloat16 and 18 for
// float32, and the sums of x * dy about 12 per element for bfloat16. More than half of them are in the loop over
// slices. Each of the three reductions processes each element once, with an addition and a maximum (one instruction per
// element for float32, one per two elements for half precision). Estimate: in the time that an H200 loads one element,
// it issues 12 for bfloat16 and 24 for float32.
//
// Launch. 256 threads per block, one tile of x per block (tiles.cuh). Each thread has four 16-byte vectors in flight:
// 16 KB per block. The registers allow two blocks per multiprocessor, with 32 KB in flight. (The 4.8 TB/s of an H200 at
// an assumed latency of 0.8 microseconds need 29 KB.) A block has 48 KB of shared memory for the results of a stage,
// and two barriers per stage.
//
// Numerics. Sums in float32 (float64 for float64). Along A0, a thread sums at most as many elements as the tile has
// slices, and the slots follow. Along A1, a thread sums at most 8 elements, and the groups follow. Along A2, the
// elements of a vector are summed pairwise, and the vectors follow. The parts are last. The order depends on the shape,
// on the dtype, on the alignment of the arrays and on the device's number of multiprocessors, but not on timing. A NaN
// makes the maxima and sums of its lines NaN.
//
// Limits. At most 2^31 - 1 tiles; each axis shorter than 2^31.

#include <algorithm>
#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/common/maximum.cuh"
#include "cuda/triplet/accumulator.cuh"
#include "cuda/triplet/passes.h"

namespace hashengine::triplet {
namespace {

// A Source has these members: Element (the type that is loaded), Value (the type that is reduced; its sums have the
// type Arithmetic<Value>), kHasMaximum, load<kWidth>(offset), whose result can wait in registers while other loads are
// issued, and values<kWidth>(loaded).

template <typename T>
struct PoolSource {
  using Element = T;
  using Value = T;
  static constexpr bool kHasMaximum = true;
  const T* x;

  template <int kWidth>
  __device__ __forceinline__ Words<T, kWidth> load(int64_t offset) const {
    return words_at<kWidth>(x, offset);
  }
  template <int kWidth>
  static __device__ __forceinline__ Vector<T, kWidth> values(const Words<T, kWidth>& loaded) {
    return as_vector<T, kWidth>(loaded);
  }
};

template <typename T>
struct ProductSource {
  using Element = T;
  using Value = Arithmetic<T>;
  static constexpr bool kHasMaximum = false;
  const T* x;
  const T* grad_y;

  template <int kWidth>
  struct Loaded {
    Words<T, kWidth> x, grad_y;
  };

  template <int kWidth>
  __device__ __forceinline__ Loaded<kWidth> load(int64_t offset) const {
    return {words_at<kWidth>(x, offset), words_at<kWidth>(grad_y, offset)};
  }
  template <int kWidth>
  static __device__ __forceinline__ Vector<Value, kWidth> values(const Loaded<kWidth>& loaded) {
    const auto factors = as_vector<T, kWidth>(loaded.x), gradients = as_vector<T, kWidth>(loaded.grad_y);
    Vector<Value, kWidth> products;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) products.at[i] = widen_at(factors, i) * widen_at(gradients, i);
    return products;
  }
};

// The sums and maxima of kCount adjacent columns or positions.
template <typename Source, int kCount>
using Running = Accumulator<typename Source::Value, kCount, Source::kHasMaximum>;

// The sum and the maximum of the elements of a vector, or of several vectors of a row. Two half-precision maxima are in
// one word, one of the elements with even indices and one of those with odd indices.
template <typename Value, int kWidth, bool kHasMaximum>
struct RowMaximum {
  typename Maxima<Value, kWidth>::Folded largest;
};
template <typename Value, int kWidth>
struct RowMaximum<Value, kWidth, false> {};

template <typename Source, int kWidth>
struct RowPart : RowMaximum<typename Source::Value, kWidth, Source::kHasMaximum> {
  using Value = typename Source::Value;
  using Real = Arithmetic<Value>;
  Real sum = 0;

  RowPart() = default;
  explicit __device__ __forceinline__ RowPart(const Vector<Value, kWidth>& values) {
    Real sums[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] = widen_at(values, i);
#pragma unroll
    for (int half = kWidth / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    sum = sums[0];
    if constexpr (Source::kHasMaximum) this->largest = Maxima<Value, kWidth>(values).folded();
  }
  __device__ __forceinline__ void add(const RowPart& other) {
    sum += other.sum;
    if constexpr (Source::kHasMaximum) this->largest.add(other.largest);
  }
};

// How the threads of a block divide a slice, and where they leave their results in shared memory. All fields are the
// same for all blocks; the last tile along an axis may have fewer rows, columns or slices.
//
// A thread reduces one vector in each of the rows group, group + groups, and so on. If a slice needs at most half of
// the threads, the block processes one slice per slot at a time. For each slice of a stage, the threads leave:
//   row_parts       [slices][rows][row_pitch], the reduction of each vector. The pitch is odd, so that threads with
//                   adjacent rows access different banks.
//   column_sums     [slices][groups][columns], the sums over the rows of each thread
//   column_maxima   [slices][groups][columns], the maxima
// After the last stage, the memory of the columns is used to merge the slots.
template <typename Source, int kWidth>
struct ReduceLayout {
  using Value = typename Source::Value;
  using Real = Arithmetic<Value>;
  using Row = RowPart<Source, kWidth>;
  static constexpr int kRows = reduce_vectors<Real>(kWidth);  // rows per thread
  static constexpr int kMergeWidth = std::min(kWidth, 4);     // columns that a thread merges together
  static constexpr int kBytes = 48 << 10;                     // of shared memory

  int rows;
  int columns;
  int groups;
  int slots;
  int row_pitch;
  int max_slices;  // per stage, a multiple of the slots
  int column_sums;
  int column_maxima;     // as column_sums, in bytes from the begin of the shared memory
  int row_part_stride;   // between a thread's vectors, in row_parts
  int64_t row_stride;    // between a thread's vectors, in x
  int64_t slice_stride;  // between a thread's slices, in x

  ReduceLayout(const Geometry& geometry, const Tiling& tiling)
      : rows(tiling.tile_size[1]), columns(tiling.tile_size[2]) {
    const int row_vectors = columns / kWidth;
    groups = ceil_div(rows, kRows);
    slots = kPassThreads / slice_threads();
    row_pitch = row_vectors | 1;
    constexpr int kColumnBytes = sizeof(Real) + (Source::kHasMaximum ? sizeof(Value) : 0);
    // The padding makes row_parts at most 1.5 times as large.
    static_assert(kPassThreads * (kRows * sizeof(Row) * 3 / 2 + kWidth * kColumnBytes) + 2 * kVectorBytes <= kBytes,
                  "there is no room for one slice per slot");
    const int row_bytes = rows * row_pitch * static_cast<int>(sizeof(Row));
    max_slices = (kBytes - 2 * kVectorBytes) / (row_bytes + groups * columns * kColumnBytes);
    max_slices -= max_slices % slots;
    const auto after = [&](int begin, int slice_bytes) {
      return begin + static_cast<int>(round_up(max_slices * slice_bytes, kVectorBytes));
    };
    column_sums = after(0, row_bytes);
    column_maxima = after(column_sums, groups * columns * static_cast<int>(sizeof(Real)));
    row_part_stride = groups * row_pitch;
    row_stride = groups * geometry.size[2];
    slice_stride = slots * geometry.size[1] * geometry.size[2];
  }

  HE_HOST_DEVICE int slice_threads() const { return groups * (columns / kWidth); }
};

// The thread's place in a slice.
template <int kWidth>
struct ThreadPart {
  int slot;
  int group;
  int column;  // the first of its kWidth columns
  int rows;    // the number of its rows

  template <typename Source>
  __device__ __forceinline__ ThreadPart(const Tile& tile, const ReduceLayout<Source, kWidth>& layout) {
    const unsigned slice_threads = layout.slice_threads(), row_vectors = layout.columns / kWidth;
    const unsigned rest = threadIdx.x % slice_threads;
    slot = static_cast<int>(threadIdx.x / slice_threads);
    group = static_cast<int>(rest / row_vectors);
    column = static_cast<int>(rest % row_vectors) * kWidth;
    const bool is_inside = slot < layout.slots && group < tile.size[1] && column < tile.size[2];
    rows = is_inside ? (tile.size[1] - group + layout.groups - 1) / layout.groups : 0;
  }
};

// The items that a thread merges: every kPassThreads-th of the items of a stage, from number `thread` on. Only the
// constructor divides.
struct SliceItems {
  int per_slice;
  int slice_step;
  int item_step;
  int slice;
  int item;

  __device__ __forceinline__ SliceItems(int slice_items, int thread)
      : per_slice(slice_items),
        slice_step(kPassThreads / slice_items),
        item_step(kPassThreads % slice_items),
        slice(thread / slice_items),
        item(thread % slice_items) {}
  __device__ __forceinline__ void step() {
    slice += slice_step;
    item += item_step;
    if (item < per_slice) return;
    item -= per_slice;
    ++slice;
  }
};

// The results in shared memory (ReduceLayout).
template <typename Source, int kWidth>
struct Stage {
  using Layout = ReduceLayout<Source, kWidth>;
  using Value = typename Source::Value;
  using Real = Arithmetic<Value>;
  using Row = typename Layout::Row;
  static constexpr int kMergeWidth = Layout::kMergeWidth;
  const Layout& layout;

  __device__ __forceinline__ Row* row_parts(int slice, int row) const {
    return dynamic_shared<Row>() + (slice * layout.rows + row) * layout.row_pitch;
  }
  __device__ __forceinline__ Real* column_sums() const {
    return reinterpret_cast<Real*>(dynamic_shared<char>() + layout.column_sums);
  }
  __device__ __forceinline__ Value* column_maxima() const {
    return reinterpret_cast<Value*>(dynamic_shared<char>() + layout.column_maxima);
  }

  // Merges the first `count` parts of a row, in their order.
  __device__ __forceinline__ Row merged_row(int slice, int row, int count) const {
    const Row* parts = row_parts(slice, row);
    Row merged = parts[0];
#pragma unroll 4
    for (int i = 1; i < count; ++i) merged.add(parts[i]);
    return merged;
  }

  template <int kCount>
  __device__ __forceinline__ void put_columns(int at, const Running<Source, kCount>& part) const {
    Vector<Real, kCount> sums;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums.at[i] = part.sum[i];
    vector_at<kCount>(column_sums(), at) = sums;
    if constexpr (Source::kHasMaximum) part.largest.store(column_maxima() + at);
  }
  // Merges `count` parts of kMergeWidth columns, in their order. They are `stride` apart.
  __device__ __forceinline__ Running<Source, kMergeWidth> merged_columns(int at, int count, int stride) const {
    Running<Source, kMergeWidth> merged;
#pragma unroll 2
    for (int i = 0; i < count; ++i, at += stride) {
      const Vector<Real, kMergeWidth> sums = vector_at<kMergeWidth>(column_sums(), at);
#pragma unroll
      for (int c = 0; c < kMergeWidth; ++c) merged.sum[c] += sums.at[c];
      if constexpr (Source::kHasMaximum) merged.largest.add(Maxima<Value, kMergeWidth>::load(column_maxima() + at));
    }
    return merged;
  }
};

// Loads the slices of a stage, one per slot at a time. Adds them to the reductions of the thread's positions, and
// stores the thread's parts of the reductions of rows and columns.
template <typename Source, int kWidth, int kRows = ReduceLayout<Source, kWidth>::kRows>
__device__ __forceinline__ void reduce_slices(const Source& source, const Stage<Source, kWidth>& stage, int slices,
                                              const ThreadPart<kWidth>& part, int64_t first_offset,
                                              Running<Source, kWidth> (&running)[kRows]) {
  const ReduceLayout<Source, kWidth>& layout = stage.layout;
  if (part.rows == 0) return;
  for (int slice = part.slot; slice < slices; slice += layout.slots, first_offset += layout.slice_stride) {
    decltype(source.template load<kWidth>(0)) loaded[kRows];
    int64_t offset = first_offset;
#pragma unroll
    for (int k = 0; k < kRows; ++k, offset += layout.row_stride)
      if (k == 0 || k < part.rows) loaded[k] = source.template load<kWidth>(offset);
    Running<Source, kWidth> columns;
    auto* row_part = stage.row_parts(slice, part.group) + part.column / kWidth;
#pragma unroll
    for (int k = 0; k < kRows; ++k, row_part += layout.row_part_stride) {
      if (k > 0 && k >= part.rows) break;
      const auto values = Source::template values<kWidth>(loaded[k]);
      running[k].add(values);
      if (k == 0) {
        columns = Running<Source, kWidth>(values);
      } else {
        columns.add(values);
      }
      *row_part = RowPart<Source, kWidth>(values);
    }
    stage.put_columns((slice * layout.groups + part.group) * layout.columns + part.column, columns);
  }
}

// Stores the maxima and the scaled sums of kCount adjacent values of a map.
template <typename Source, int kCount, typename Real>
__device__ __forceinline__ void store(const TileMap<Real>& map, int outer, int inner,
                                      const Running<Source, kCount>& reduced) {
  Vector<Real, kCount> maxima{}, sums;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (Source::kHasMaximum) maxima.at[i] = widen(reduced.largest.at(i));
    sums.at[i] = reduced.sum[i];
  }
  map.template store<Source::kHasMaximum>(outer, inner, maxima, sums);
}

// Stores the reduction over A0 of each position, after the last slice. If there are several slots, their results are
// merged in the order of the slots.
template <typename Source, int kWidth, typename Real, int kRows = ReduceLayout<Source, kWidth>::kRows>
__device__ __forceinline__ void store_positions(const TileMap<Real>& map, const Tile& tile,
                                                const Stage<Source, kWidth>& stage, const ThreadPart<kWidth>& part,
                                                const Running<Source, kWidth> (&running)[kRows]) {
  const ReduceLayout<Source, kWidth>& layout = stage.layout;
  if (layout.slots == 1) {
#pragma unroll
    for (int k = 0; k < kRows; ++k)
      if (k < part.rows) store<Source>(map, part.group + k * layout.groups, part.column, running[k]);
    return;
  }
  // The k-th rows of all groups are adjacent. At most half of the threads process them in one slot, so each thread
  // merges at most kMergeWidth of their values.
  constexpr int kMergeWidth = ReduceLayout<Source, kWidth>::kMergeWidth;
  const int slot_values = layout.groups * layout.columns, at = static_cast<int>(threadIdx.x) * kMergeWidth;
  const int group = at / layout.columns, column = at % layout.columns;
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const int row = group + k * layout.groups;
    if (k < part.rows)
      stage.put_columns(part.slot * slot_values + part.group * layout.columns + part.column, running[k]);
    __syncthreads();
    if (group < layout.groups && row < tile.size[1] && column < tile.size[2])
      store<Source>(map, row, column, stage.merged_columns(at, layout.slots, slot_values));
    __syncthreads();
  }
}

template <typename Source, int kWidth>
__global__ void __launch_bounds__(kPassThreads, 2)
    reduce_kernel(Source source, Geometry geometry, Tiling tiling, ReduceLayout<Source, kWidth> layout,
                  AxisMaps<Arithmetic<typename Source::Value>> maps) {
  using Real = Arithmetic<typename Source::Value>;
  constexpr int kMergeWidth = ReduceLayout<Source, kWidth>::kMergeWidth;
  const Tile tile = Tile::of_block(geometry, tiling, blockIdx.x);
  const ThreadPart<kWidth> part(tile, layout);
  const Stage<Source, kWidth> stage{layout};
  // The threads with the highest numbers have the fewest columns to merge. They begin with the rows.
  const SliceItems first_columns(tile.size[2] / kMergeWidth, static_cast<int>(threadIdx.x));
  const SliceItems first_row(tile.size[1], kPassThreads - 1 - static_cast<int>(threadIdx.x));
  const int groups = min(layout.groups, tile.size[1]);  // that have a row
  const TileMap<Real> column_map = maps.of_tile(1, tile), row_map = maps.of_tile(2, tile);
  const int64_t own_offset = part.group * geometry.size[2] + part.column;
  Running<Source, kWidth> running[ReduceLayout<Source, kWidth>::kRows];

  for (int first = 0; first < tile.size[0]; first += layout.max_slices) {
    const int slices = min(layout.max_slices, tile.size[0] - first);
    reduce_slices(source, stage, slices, part, tile.slice_begin(geometry, first + part.slot) + own_offset, running);
    __syncthreads();
    if (column_map.first)
      for (SliceItems at = first_columns; at.slice < slices; at.step())
        store<Source>(column_map, first + at.slice, at.item * kMergeWidth,
                      stage.merged_columns(at.slice * layout.groups * layout.columns + at.item * kMergeWidth, groups,
                                           layout.columns));
    if (row_map.first)
      for (SliceItems at = first_row; at.slice < slices; at.step()) {
        const auto merged = stage.merged_row(at.slice, at.item, tile.size[2] / kWidth);
        Vector<Real, 1> largest{};
        if constexpr (Source::kHasMaximum) largest.at[0] = merged.largest.overall();
        row_map.template store<Source::kHasMaximum>(first + at.slice, at.item, largest, Vector<Real, 1>{{merged.sum}});
      }
    __syncthreads();  // the shared memory can be overwritten
  }
  const TileMap<Real> position_map = maps.of_tile(0, tile);
  if (position_map.first) store_positions(position_map, tile, stage, part, running);
}

template <typename Source, typename Real>
void launch_reduce(const Source& source, const Geometry& geometry, const PassPlan& plan, const AxisMaps<Real>& maps,
                   cudaStream_t stream) {
  with_vector_width<typename Source::Element>(plan.width, [&](auto width) {
    using Layout = ReduceLayout<Source, decltype(width)::value>;
    launch(reduce_kernel<Source, decltype(width)::value>,
           {plan.tiling.blocks(geometry.samples), kPassThreads, Layout::kBytes}, stream, source, geometry, plan.tiling,
           Layout(geometry, plan.tiling), maps);
  });
}

}  // namespace

template <typename Real>
void launch_reduce_pool(const void* x, Dtype dtype, const Geometry& geometry, const PassPlan& plan,
                        const AxisMaps<Real>& maps, cudaStream_t stream) {
  with_element<Real>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_reduce(PoolSource<T>{static_cast<const T*>(x)}, geometry, plan, maps, stream);
  });
}

template <typename Real>
void launch_reduce_products(const void* x, const void* grad_y, Dtype dtype, const Geometry& geometry,
                            const PassPlan& plan, const AxisMaps<Real>& maps, cudaStream_t stream) {
  with_element<Real>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_reduce(ProductSource<T>{static_cast<const T*>(x), static_cast<const T*>(grad_y)}, geometry, plan, maps,
                  stream);
  });
}

template void launch_reduce_pool(const void*, Dtype, const Geometry&, const PassPlan&, const AxisMaps<float>&,
                                 cudaStream_t);
template void launch_reduce_pool(const void*, Dtype, const Geometry&, const PassPlan&, const AxisMaps<double>&,
                                 cudaStream_t);
template void launch_reduce_products(const void*, const void*, Dtype, const Geometry&, const PassPlan&,
                                     const AxisMaps<float>&, cudaStream_t);
template void launch_reduce_products(const void*, const void*, Dtype, const Geometry&, const PassPlan&,
                                     const AxisMaps<double>&, cudaStream_t);

}  // namespace hashengine::triplet
