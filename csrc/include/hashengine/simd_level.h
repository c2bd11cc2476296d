// Which vector instructions a CPU kernel may use.
//
// A function that uses a level's instructions has the level's target attribute. No source file has compiler flags of
// its own. Therefore one build runs on every CPU of its architecture: code that several levels share contains no
// instructions that a CPU may lack.
#pragma once

#include <string>
#include <vector>

namespace hashengine {

enum class SimdLevel { kScalar, kAvx2, kAvx512, kNeon };

// The levels that both this build and this CPU support, in ascending order. The first is always kScalar.
const std::vector<SimdLevel>& supported_simd_levels();

const char* simd_level_name(SimdLevel level);

// The level that the environment variable HASHENGINE_SIMD_LEVEL names. If the variable is unset, empty or "auto", it is
// the highest supported level. Throws std::invalid_argument, with a message of one line, if the name is unknown or this
// CPU does not support the level.
SimdLevel chosen_simd_level();

}  // namespace hashengine

#define HE_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define HE_X86 1
#ifndef HE_TARGET_AVX2
#define HE_TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif
// The tests define this macro as empty and replace the intrinsics with plain C++ functions. The AVX-512 kernels then
// run on any CPU.
#ifndef HE_TARGET_AVX512
#define HE_TARGET_AVX512 __attribute__((target("avx512f,avx512dq,avx512vpopcntdq")))
#endif
#elif defined(__aarch64__)
#define HE_ARM 1  // every 64-bit ARM CPU has NEON, so functions need no attribute for it
#endif
