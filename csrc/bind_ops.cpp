// The hot path from Python: bodies of the ops that read their tensors through
// DLPack's C interface, since a handful of attribute look-ups in Python costs
// more than counting.
#include "bindings.h"
#include "device_lanes.h"
#include "device_registry.h"
#include "dlpack.h"
#include "lane.h"

namespace py = pybind11;

namespace dodoco {
namespace {

// Below this many elements, releasing the interpreter lock costs more than it
// gives.
constexpr std::int64_t kReleaseGilAbove = 16384;

enum Form { kIds, kMap, kBits };

// What torch told us at import: see use_torch().
struct Torch {
  const dlpack::ExchangeApi* api;
  PyObject* tensor_type;
  PyObject* graph_task_id;  // callables without arguments
  PyObject* dispatch_stack_length;
  PyObject* general[3];  // Python bodies of the ops, which know about every kind of tensor
  PyObject* fault;       // (result, tensor, site): reports what record_at_site() refused
} g_torch{};

// Calls a function without arguments that returns an int. -1 with a Python
// error set on failure.
long call_for_integer(PyObject* function) {
  PyObject* result = PyObject_CallNoArgs(function);
  if (result == nullptr) return -1;
  const long value = PyLong_AsLong(result);
  Py_DECREF(result);
  return value;
}

// True: described. False: not a tensor in the memory of this machine or of a
// CUDA device; no error is set.
bool describe(PyObject* object, dlpack::Tensor* tensor) {
  if (g_torch.api->describe(object, tensor) == 0)
    return tensor->device_type == dlpack::kCpu || tensor->device_type == dlpack::kCuda;
  PyErr_Clear();
  return false;
}

// The framework's current stream of a device.
bool find_stream(std::int32_t device_type, std::int32_t device, void** stream) {
  if (g_torch.api == nullptr || g_torch.api->current_work_stream == nullptr) return false;
  if (g_torch.api->current_work_stream(device_type, device, stream) == 0) return true;
  PyErr_Clear();
  return false;
}

template <typename Tensor>
RecordResult record(const void* site, const Tensor& tensor, std::int64_t elements,
                    bool recomputed) {
  if (elements <= kReleaseGilAbove) return record_at_site(site, tensor, recomputed);
  PyThreadState* state = PyEval_SaveThread();
  const RecordResult result = record_at_site(site, tensor, recomputed);
  PyEval_RestoreThread(state);
  return result;
}

// What became of a tensor on the native path.
enum class Outcome { kDone, kNotPlain, kError };  // kError: a Python error is set

// Not run again in Python when refused: the pass has been seen, and a second look would count it as
// another iteration.
Outcome settle(RecordResult result, PyObject* object, PyObject* site) {
  if (static_cast<int>(result) >= 0) return Outcome::kDone;
  PyObject* reported =
      PyObject_CallFunction(g_torch.fault, "iOO", static_cast<int>(result), object, site);
  if (reported == nullptr) return Outcome::kError;
  Py_DECREF(reported);
  return Outcome::kDone;
}

bool is_ids(const dlpack::Tensor& t) { return t.type_code == dlpack::kInt && t.type_bits >= 16; }

bool is_map(const dlpack::Tensor& t, bool packed) {
  const bool is_byte = t.type_code == dlpack::kUnsigned && t.type_bits == 8;
  return is_byte || (!packed && t.type_code == dlpack::kBool);
}

RecordResult record_ids(const dlpack::Tensor& t, const void* site, bool recomputed) {
  const IdType type = t.type_bits == 64   ? IdType::kInt64
                      : t.type_bits == 32 ? IdType::kInt32
                                          : IdType::kInt16;
  const IdTensor ids{t.address(), type, t.shape[0], t.shape[1], t.strides[0], t.strides[1]};
  return record(site, ids, ids.rows * ids.k, recomputed);
}

RecordResult record_map(const dlpack::Tensor& t, const void* site, bool packed, bool recomputed) {
  const MapTensor map{t.address(), packed, t.shape[0], t.shape[1], t.strides[0], t.strides[1]};
  return record(site, map, map.rows * map.columns, recomputed);
}

// The same for tensors on a device, in its framework's current stream. The interpreter lock is
// released: where a stream has no room, the driver waits for what is in it, and that may be a
// function that needs the lock.
RecordResult record_on_device(std::uintptr_t site, const DeviceTensor& tensor, cuda::Stream stream,
                              bool recomputed) {
  DeviceLanes* lanes = device_registry::of_site(site);
  if (lanes == nullptr) {
    return device_registry::is_switched_off(site) ? RecordResult::kIgnored
                                                  : RecordResult::kCopiedSite;
  }
  PyThreadState* state = PyEval_SaveThread();
  const RecordResult result = lanes->launch(site, tensor, stream, recomputed);
  PyEval_RestoreThread(state);
  return result;
}

RecordResult record_on_device(const dlpack::Tensor& t, const dlpack::Tensor& site, Form form,
                              bool recomputed) {
  void* stream = nullptr;
  if (!find_stream(t.device_type, t.device_id, &stream)) return RecordResult::kDeviceError;
  const DeviceTensor tensor{t.address(),
                            static_cast<ChoiceForm>(form),
                            form == kIds ? t.type_bits / 8 : 0,
                            t.shape[0],
                            t.shape[1],
                            t.strides[0],
                            t.strides[1]};
  return record_on_device(reinterpret_cast<std::uintptr_t>(site.address()), tensor,
                          static_cast<cuda::Stream>(stream), recomputed);
}

// Records what needs no conversion; the rest is for the general body.
template <Form form>
Outcome record_plain(PyObject* object, PyObject* site_object) {
  dlpack::Tensor tensor, site;
  if (!describe(object, &tensor) || tensor.ndim != 2 || tensor.strides == nullptr ||
      !(form == kIds ? is_ids(tensor) : is_map(tensor, form == kBits)) ||
      !describe(site_object, &site)) {
    return Outcome::kNotPlain;
  }
  const bool recomputed = call_for_integer(g_torch.graph_task_id) != -1;
  RecordResult result;
  if (site.device_type != tensor.device_type || site.device_id != tensor.device_id) {
    result = RecordResult::kCopiedSite;  // the model was moved: neither is looked into
  } else if (tensor.device_type == dlpack::kCuda) {
    result = record_on_device(tensor, site, form, recomputed);
  } else if (form == kIds) {
    result = record_ids(tensor, site.address(), recomputed);
  } else {
    result = record_map(tensor, site.address(), form == kBits, recomputed);
  }
  return settle(result, object, site_object);
}

// route_*(tensor, site) -> None: the body of an op.
template <Form form>
PyObject* route(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count == 2) {
    const Outcome outcome = record_plain<form>(args[0], args[1]);
    if (outcome == Outcome::kError) return nullptr;
    if (outcome == Outcome::kDone) Py_RETURN_NONE;
  }
  return PyObject_Vectorcall(g_torch.general[form], args, static_cast<std::size_t>(count), nullptr);
}

// direct_*(tensor, site) -> recorded: past the dispatcher, where nothing listens to it. Not for
// subclasses (fake, distributed) or under a dispatch mode: they must see an op.
template <Form form>
PyObject* direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "2 arguments expected, %zd given", count);
  if (reinterpret_cast<PyObject*>(Py_TYPE(args[0])) != g_torch.tensor_type ||
      call_for_integer(g_torch.dispatch_stack_length) != 0) {
    Py_RETURN_FALSE;
  }
  const Outcome outcome = record_plain<form>(args[0], args[1]);
  if (outcome == Outcome::kError) return nullptr;
  return PyBool_FromLong(outcome == Outcome::kDone);
}

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

// Where Python says where the site is. One of a device is not looked into: the model was moved.
template <typename Tensor>
RecordResult record_at(std::int64_t site, const Tensor& tensor, std::int64_t elements,
                       bool recomputed) {
  if (device_registry::of_site(static_cast<std::uint64_t>(site)) != nullptr)
    return RecordResult::kCopiedSite;
  return record(reinterpret_cast<const void*>(site), tensor, elements, recomputed);
}

// route_ids(site, data, bytes_per_id, rows, k, row_stride, slot_stride,
// recomputed) -> result
PyObject* route_ids(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::int64_t a[8];
  if (!to_integers(args, count, 8, a)) return nullptr;
  const IdType type = a[2] == 8 ? IdType::kInt64 : a[2] == 4 ? IdType::kInt32 : IdType::kInt16;
  const IdTensor ids{reinterpret_cast<const void*>(a[1]), type, a[3], a[4], a[5], a[6]};
  return PyLong_FromLong(static_cast<long>(record_at(a[0], ids, a[3] * a[4], a[7] != 0)));
}

// route_map(site, data, packed, rows, columns, row_stride, column_stride,
// recomputed) -> result
PyObject* route_map(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::int64_t a[8];
  if (!to_integers(args, count, 8, a)) return nullptr;
  const MapTensor map{
      reinterpret_cast<const std::uint8_t*>(a[1]), a[2] != 0, a[3], a[4], a[5], a[6]};
  return PyLong_FromLong(static_cast<long>(record_at(a[0], map, a[3] * a[4], a[7] != 0)));
}

// launch_ids(site, data, bytes_per_id, rows, k, row_stride, slot_stride,
// recomputed, stream) -> result: route_ids() for tensors on a device
PyObject* launch_ids(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::int64_t a[9];
  if (!to_integers(args, count, 9, a)) return nullptr;
  const DeviceTensor ids{reinterpret_cast<const void*>(a[1]),
                         ChoiceForm::kIds,
                         static_cast<int>(a[2]),
                         a[3],
                         a[4],
                         a[5],
                         a[6]};
  const RecordResult result = record_on_device(static_cast<std::uintptr_t>(a[0]), ids,
                                               reinterpret_cast<cuda::Stream>(a[8]), a[7] != 0);
  return PyLong_FromLong(static_cast<long>(result));
}

// launch_map(site, data, packed, rows, columns, row_stride, column_stride,
// recomputed, stream) -> result: route_map() for tensors on a device
PyObject* launch_map(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::int64_t a[9];
  if (!to_integers(args, count, 9, a)) return nullptr;
  const ChoiceForm form = a[2] != 0 ? ChoiceForm::kBitMap : ChoiceForm::kByteMap;
  const DeviceTensor map{reinterpret_cast<const void*>(a[1]), form, 0, a[3], a[4], a[5], a[6]};
  const RecordResult result = record_on_device(static_cast<std::uintptr_t>(a[0]), map,
                                               reinterpret_cast<cuda::Stream>(a[8]), a[7] != 0);
  return PyLong_FromLong(static_cast<long>(result));
}

// use_torch(exchange_api, tensor_type, graph_task_id, dispatch_stack_length,
//           general_ids, general_map, general_bits, fault)
// -> whether the bodies below can be used; if not, the general ones serve alone
PyObject* use_torch(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 8) return PyErr_Format(PyExc_TypeError, "8 arguments expected, %zd given", count);
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  if (api == nullptr) PyErr_Clear();  // another kind of capsule: a later DLPack
  while (api != nullptr && api->major_version != dlpack::kMajorVersion) api = api->previous;
  if (api == nullptr || api->describe == nullptr) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < count; ++i) Py_INCREF(args[i]);  // for the life of the process
  g_torch = {api, args[1], args[2], args[3], {args[4], args[5], args[6]}, args[7]};
  Py_RETURN_TRUE;
}

template <PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction fast() noexcept {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef kOps[] = {
    {"route_ids", fast<route_ids>(), METH_FASTCALL, "Records expert ids."},
    {"route_map", fast<route_map>(), METH_FASTCALL, "Records a routing map."},
    {"launch_ids", fast<launch_ids>(), METH_FASTCALL, "Records expert ids on a device."},
    {"launch_map", fast<launch_map>(), METH_FASTCALL, "Records a routing map on a device."},
    {"use_torch", fast<use_torch>(), METH_FASTCALL, "Says how to read and judge tensors."},
    {"op_ids", fast<route<kIds>>(), METH_FASTCALL, "Body of dodoco::route_ids."},
    {"op_map", fast<route<kMap>>(), METH_FASTCALL, "Body of dodoco::route_map."},
    {"op_bits", fast<route<kBits>>(), METH_FASTCALL, "Body of dodoco::route_bits."},
    {"direct_ids", fast<direct<kIds>>(), METH_FASTCALL, "The same without torch's dispatcher."},
    {"direct_map", fast<direct<kMap>>(), METH_FASTCALL, "The same without torch's dispatcher."},
    {"direct_bits", fast<direct<kBits>>(), METH_FASTCALL, "The same without torch's dispatcher."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void* current_stream(int device) {
  void* stream = nullptr;
  return find_stream(dlpack::kCuda, device, &stream) ? stream : nullptr;
}

void register_ops(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), kOps) != 0) throw py::error_already_set();
}

}  // namespace dodoco
