// Functions of csrc/cpu/common/lanes.h as C functions. Those with a parameter `level` run at that SIMD level.

#include "cpu/common/lanes.h"

using namespace hashengine;

namespace {

// Applies Operation to eight elements of `from` at a time, and stores the results in `to`. count is a multiple of 8.
template <typename From, typename To, typename Operation>
struct Map {
  static HE_INLINE void run(const From* from, To* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, Operation::apply(load(from + i)));
  }
};

struct Identity {
  static HE_INLINE Lanes<float> apply(Lanes<float> x) { return x; }
};
struct Exp {
  static HE_INLINE Lanes<float> apply(Lanes<float> x) { return exp_lanes(x); }
};
struct Exp2 {
  static HE_INLINE Lanes<float> apply(Lanes<float> x) { return exp2_nonpositive(x); }
};
struct Sigmoid {
  static HE_INLINE Lanes<float> apply(Lanes<float> x) { return sigmoid_lanes(x); }
};
struct Sum {
  static HE_INLINE Lanes<float> apply(Lanes<float> x) { return broadcast(sum_lanes(x)); }
};

template <typename Operation, typename From = float, typename To = float>
void map(int level, const void* from, void* to, int64_t count) {
  run_at_level<Map<From, To, Operation>>(static_cast<SimdLevel>(level), static_cast<const From*>(from),
                                         static_cast<To*>(to), count);
}

template <typename Element>
void copy_first(const void* from, void* to, int count) {
  store_first(static_cast<Element*>(to), load_first(static_cast<const Element*>(from), count), count);
}

}  // namespace

extern "C" {
int lanes_supported_levels() { return int(supported_simd_levels().size()); }
void lanes_exp(int level, const void* from, void* to, int64_t count) { map<Exp>(level, from, to, count); }
void lanes_exp2(int level, const void* from, void* to, int64_t count) { map<Exp2>(level, from, to, count); }
void lanes_sigmoid(int level, const void* from, void* to, int64_t count) { map<Sigmoid>(level, from, to, count); }
void lanes_sum(int level, const void* from, void* to, int64_t count) { map<Sum>(level, from, to, count); }
void widen_float16(int level, const void* from, void* to, int64_t count) {
  map<Identity, Float16, float>(level, from, to, count);
}
void widen_bfloat16(int level, const void* from, void* to, int64_t count) {
  map<Identity, BFloat16, float>(level, from, to, count);
}
void narrow_float16(int level, const void* from, void* to, int64_t count) {
  map<Identity, float, Float16>(level, from, to, count);
}
void narrow_bfloat16(int level, const void* from, void* to, int64_t count) {
  map<Identity, float, BFloat16>(level, from, to, count);
}
void copy_first_float(const void* from, void* to, int count) { copy_first<float>(from, to, count); }
void copy_first_float16(const void* from, void* to, int count) { copy_first<Float16>(from, to, count); }
}
