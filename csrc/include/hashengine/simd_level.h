// Which vector instructions a CPU kernel may use. Functions of a level carry its target attribute instead of compiler
// flags for the whole file: one build runs everywhere, and nothing that is shared between levels can be compiled for a
// CPU that lacks the instructions.
#pragma once

#include <string>
#include <vector>

namespace hashengine {

enum class SimdLevel { kScalar, kAvx2, kAvx512, kNeon };

// The levels that this build and this CPU have, ascending; scalar is always first.
const std::vector<SimdLevel>& supported_simd_levels();

const char* simd_level_name(SimdLevel level);

// The level that HASHENGINE_SIMD_LEVEL names, else the highest. Throws std::invalid_argument, with one line that says
// what was expected, for a name that is unknown or that this CPU does not support.
SimdLevel chosen_simd_level();

}  // namespace hashengine

#define HE_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define HE_X86 1
#ifndef HE_TARGET_AVX2
#define HE_TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif
// A test on a CPU without AVX-512 defines this empty and puts plain C++ in the intrinsics' place.
#ifndef HE_TARGET_AVX512
#define HE_TARGET_AVX512 __attribute__((target("avx512f,avx512dq,avx512vpopcntdq")))
#endif
#elif defined(__aarch64__)
#define HE_ARM 1  // every such CPU has NEON, and functions need no attribute for it
#endif
