// The hot path from Python: plain C calls over integers (addresses, sizes, strides), since a
// pybind11 call costs several times as much as what it would call.
#include "bindings.h"
#include "lane.h"

namespace py = pybind11;

namespace dodoco {
namespace {

// Below this many elements, releasing the interpreter lock costs more than it gives.
constexpr std::int64_t kReleaseGilAbove = 16384;

bool to_integers(PyObject* const* args, Py_ssize_t count, Py_ssize_t expected, std::int64_t* out) {
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "%zd arguments expected, %zd given", expected, count);
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    out[i] = PyLong_AsLongLong(args[i]);
    if (out[i] == -1 && PyErr_Occurred() != nullptr) return false;
  }
  return true;
}

template <typename Tensor>
PyObject* record(std::int64_t site, const Tensor& tensor, std::int64_t elements, bool recomputed) {
  const void* address = reinterpret_cast<const void*>(site);
  RecordResult result;
  if (elements > kReleaseGilAbove) {
    PyThreadState* state = PyEval_SaveThread();
    result = record_at_site(address, tensor, recomputed);
    PyEval_RestoreThread(state);
  } else {
    result = record_at_site(address, tensor, recomputed);
  }
  return PyLong_FromLong(static_cast<long>(result));
}

// route_ids(site, data, bytes_per_id, rows, k, row_stride, slot_stride, recomputed) -> result
PyObject* route_ids(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::int64_t a[8];
  if (!to_integers(args, count, 8, a)) return nullptr;
  const IdType type = a[2] == 8 ? IdType::kInt64 : a[2] == 4 ? IdType::kInt32 : IdType::kInt16;
  const IdTensor ids{reinterpret_cast<const void*>(a[1]), type, a[3], a[4], a[5], a[6]};
  return record(a[0], ids, a[3] * a[4], a[7] != 0);
}

// route_map(site, data, packed, rows, columns, row_stride, column_stride, recomputed) -> result
PyObject* route_map(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::int64_t a[8];
  if (!to_integers(args, count, 8, a)) return nullptr;
  const MapTensor map{
      reinterpret_cast<const std::uint8_t*>(a[1]), a[2] != 0, a[3], a[4], a[5], a[6]};
  return record(a[0], map, a[3] * a[4], a[7] != 0);
}

PyMethodDef kOps[] = {
    {"route_ids", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(route_ids)),
     METH_FASTCALL, "Records expert ids; returns 0 (recorded), 1 (ignored) or a negative fault."},
    {"route_map", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(route_map)),
     METH_FASTCALL,
     "Records a routing map; returns 0 (recorded), 1 (ignored) or a negative fault."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void register_ops(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), kOps) != 0) throw py::error_already_set();
}

}  // namespace dodoco
