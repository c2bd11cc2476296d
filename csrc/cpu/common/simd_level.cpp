#include "hashengine/simd_level.h"

#include <cstdlib>
#include <stdexcept>

namespace hashengine {

const std::vector<SimdLevel>& supported_simd_levels() {
  static const std::vector<SimdLevel> levels = [] {
    std::vector<SimdLevel> found{SimdLevel::kScalar};
#ifdef HE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(SimdLevel::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vpopcntdq"))
      found.push_back(SimdLevel::kAvx512);
#elif defined(HE_ARM)
    found.push_back(SimdLevel::kNeon);
#endif
    return found;
  }();
  return levels;
}

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::kNeon: return "neon";
    case SimdLevel::kAvx512: return "avx512";
    case SimdLevel::kAvx2: return "avx2";
    default: return "scalar";
  }
}

SimdLevel chosen_simd_level() {
  const std::vector<SimdLevel>& levels = supported_simd_levels();
  const char* requested = std::getenv("HASHENGINE_SIMD_LEVEL");
  if (requested == nullptr || *requested == '\0' || std::string(requested) == "auto") return levels.back();
  std::string names = "auto";
  for (SimdLevel level : levels) {
    if (std::string(requested) == simd_level_name(level)) return level;
    names += std::string(", ") + simd_level_name(level);
  }
  throw std::invalid_argument("hashengine: HASHENGINE_SIMD_LEVEL must be one of " + names + " on this CPU, got " +
                              requested);
}

}  // namespace hashengine
