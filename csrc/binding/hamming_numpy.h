#pragma once

#include <pybind11/pybind11.h>

namespace hashengine::binding {

// Adds the function hamming_topk, for numpy arrays, to the module hashengine._C.
void define_numpy_search(pybind11::module_& module);

}  // namespace hashengine::binding
