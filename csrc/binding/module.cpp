// The Python module hashengine._C. Importing it registers the kernels with torch's dispatcher. The module's functions
// report how it was built, which SIMD levels this CPU supports, and which of these levels is in use; and hamming_topk
// searches numpy arrays.

#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "binding/hamming_numpy.h"
#include "hashengine/simd_level.h"

namespace {

std::map<std::string, std::string> build_config() {
  return {
      {"compiler_version", __VERSION__},
      {"cplusplus", std::to_string(__cplusplus)},
      {"openmp", std::to_string(_OPENMP)},
  };
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (hashengine::SimdLevel level : hashengine::supported_simd_levels())
    names.emplace_back(hashengine::simd_level_name(level));
  return names;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("build_config", &build_config, "The compiler, C++ and OpenMP versions of the build.");
  module.def("simd_levels", &simd_levels, "The SIMD levels that this CPU supports, ascending.");
  module.def(
      "simd_level", [] { return hashengine::simd_level_name(hashengine::chosen_simd_level()); },
      "The SIMD level in use: the level that HASHENGINE_SIMD_LEVEL names, otherwise the highest. Raises ValueError if "
      "the named level is unknown or this CPU lacks it.");
  hashengine::binding::define_numpy_search(module);
}
