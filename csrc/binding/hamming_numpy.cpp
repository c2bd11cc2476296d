// hamming_topk on numpy arrays, called without torch's dispatcher. Converting arrays to tensors and dispatching the op
// takes several times as long as a search of a thousand codes for one query.
#include "binding/hamming_numpy.h"

#include <pybind11/numpy.h>

#include <optional>

#include "binding/check.h"
#include "hashengine/hamming.h"

namespace py = pybind11;

namespace hashengine::binding {
namespace {

// `object` as an array if it is a numpy array [rows, columns] of uint8 in C order.
std::optional<py::array> as_rows(py::handle object) {
  if (!py::isinstance<py::array>(object)) return std::nullopt;
  auto array = py::reinterpret_borrow<py::array>(object);
  const bool is_uint8 = array.dtype().num() == py::dtype::num_of<uint8_t>();
  if (!is_uint8 || array.ndim() != 2 || !(array.flags() & py::array::c_style)) return std::nullopt;
  return array;
}

// The answer of hamming_topk as two arrays, or None if the arguments are not what it takes. In that case, the op either
// answers or says what is wrong.
py::object topk(py::handle query_rows, py::handle code_rows, int64_t k, py::handle bitmap, int64_t num_threads) {
  const std::optional<py::array> queries = as_rows(query_rows), codes = as_rows(code_rows);
  if (!queries || !codes) return py::none();
  const int64_t query_count = queries->shape(0), code_count = codes->shape(0), bytes = codes->shape(1);
  if (queries->shape(1) != bytes || bytes < 1 || bytes > kHammingMaxBytes) return py::none();
  if (k < 1 || k > code_count || num_threads < 0) return py::none();
  const auto* filter = bitmap.is_none() ? nullptr : static_cast<const uint8_t*>(py::cast<py::array>(bitmap).data());
  const HammingSearch search = {static_cast<const uint8_t*>(queries->data()),
                                static_cast<const uint8_t*>(codes->data()),
                                query_count,
                                code_count,
                                bytes,
                                filter,
                                0};
  py::array_t<int32_t> distances({query_count, k});
  py::array_t<int64_t> positions({query_count, k});
  {
    const SimdLevel level = chosen_simd_level();
    const ThreadPool pool = torch_thread_pool(num_threads);
    int32_t* const near = distances.mutable_data();
    int64_t* const rows = positions.mutable_data();
    const py::gil_scoped_release released;
    hamming_topk_cpu(search, k, near, rows, level, pool);
  }
  return py::make_tuple(std::move(distances), std::move(positions));
}

}  // namespace

void define_numpy_search(py::module_& module) {
  module.def("hamming_topk", &topk, py::arg("queries"), py::arg("codes"), py::arg("k"), py::arg("filter"),
             py::arg("num_threads"),
             "hamming_topk for numpy arrays, uint8 [Q, bits / 8] and [N, bits / 8] in C order: distances int32 [Q, k] "
             "and positions int64 [Q, k]. `filter` is None or a bitmap, uint8 [ceil(N / 8)], which is not checked. "
             "Returns None for other arguments, which torch.ops.hashengine.hamming_topk takes or refuses.");
}

}  // namespace hashengine::binding
