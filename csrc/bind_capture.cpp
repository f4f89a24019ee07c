// Transfers whose counts the host has: from lists of Python's, or from arrays.
#include <cstdint>
#include <cstring>
#include <vector>

#include "bindings.h"
#include "lane.h"

namespace py = pybind11;

namespace dodoco {
namespace {

// The arguments of push_transfer(), in order.
enum Argument { kLane, kType, kLayer, kIteration, kAdvances, kBegin, kEnd, kBytes, kLists };
constexpr Py_ssize_t kArguments = kLists + 3;

// Counts out of a Python object, alive as long as this is.
class HostCounts {
 public:
  HostCounts() = default;
  ~HostCounts() {
    if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
  }
  HostCounts(const HostCounts&) = delete;
  HostCounts& operator=(const HostCounts&) = delete;

  // A list or tuple of integers, or an array of 4- or 8-byte integers. False: a Python error is
  // set.
  bool take(PyObject* object) {
    if (object == Py_None) return true;
    return PyList_Check(object) || PyTuple_Check(object) ? take_list(object) : take_array(object);
  }

  const Counts& counts() const { return counts_; }

 private:
  bool take_list(PyObject* object) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(object);
    if (size > kMostCounts) return refuse(size);
    std::uint32_t* values = inline_;
    if (size > kInline) {
      allocated_.resize(static_cast<std::size_t>(size));
      values = allocated_.data();
    }
    for (Py_ssize_t i = 0; i < size; ++i) {
      const long long value = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(object, i));
      if (value == -1 && PyErr_Occurred() != nullptr) return false;
      if (value < 0 || value > UINT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%lld rows: give 0 to 4294967295", value);
        return false;
      }
      values[i] = static_cast<std::uint32_t>(value);
    }
    counts_ = {values, 1, static_cast<std::uint32_t>(size), 0};
    return true;
  }

  bool take_array(PyObject* object) {
    if (PyObject_GetBuffer(object, &buffer_, PyBUF_RECORDS_RO) != 0) {
      PyErr_Format(PyExc_TypeError, "give a list, a tuple or an array of integers, not %s",
                   Py_TYPE(object)->tp_name);
      return false;
    }
    const bool integers = buffer_.format != nullptr && buffer_.format[0] != '\0' &&
                          buffer_.format[1] == '\0' &&
                          std::strchr("iIlLqQ", buffer_.format[0]) != nullptr;
    if (buffer_.ndim != 1 || !integers || (buffer_.itemsize != 4 && buffer_.itemsize != 8) ||
        buffer_.strides[0] % buffer_.itemsize != 0) {
      PyErr_SetString(PyExc_ValueError, "give one row of 4- or 8-byte integers");
      return false;
    }
    if (buffer_.shape[0] > kMostCounts) return refuse(buffer_.shape[0]);
    counts_ = {buffer_.buf, buffer_.strides[0] / buffer_.itemsize,
               static_cast<std::uint32_t>(buffer_.shape[0]), buffer_.itemsize == 8};
    return true;
  }

  static bool refuse(Py_ssize_t size) {
    PyErr_Format(PyExc_ValueError, "%zd counts: at most %d", size, kMostCounts);
    return false;
  }

  static constexpr int kInline = 64, kMostCounts = UINT16_MAX;
  std::uint32_t inline_[kInline];
  std::vector<std::uint32_t> allocated_;
  Py_buffer buffer_{};
  Counts counts_{nullptr, 1, 0, 0};
};

bool to_integers(PyObject* const* args, std::int64_t (&out)[kLists]) {
  for (int i = 0; i < kLists; ++i) {
    out[i] = PyLong_AsLongLong(args[i]);
    if (out[i] == -1 && PyErr_Occurred() != nullptr) return false;
  }
  return true;
}

// push_transfer(lane, type and flags, layer, iteration, advances, begin_ns, end_ns, bytes_per_row,
//               sent, received, experts)
// -> the iteration recorded; -1: nothing was, as it should be; below: a RecordResult less one
PyObject* push_transfer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kArguments)
    return PyErr_Format(PyExc_TypeError, "%zd arguments expected, %zd given", kArguments, count);
  std::int64_t a[kLists];
  HostCounts sent, received, experts;
  if (!to_integers(args, a) || !sent.take(args[kLists]) || !received.take(args[kLists + 1]) ||
      !experts.take(args[kLists + 2])) {
    return nullptr;
  }
  if (a[kLayer] < 0 || a[kBytes] < 0 || a[kBytes] > UINT32_MAX) {
    PyErr_SetString(PyExc_ValueError, "layer and bytes_per_row must be 32-bit numbers");
    return nullptr;
  }
  Transfer transfer{};
  transfer.sent = sent.counts();
  transfer.received = received.counts();
  transfer.experts = experts.counts();
  transfer.iteration = a[kIteration];
  transfer.begin_ns = static_cast<std::uint64_t>(a[kBegin]);
  transfer.end_ns = static_cast<std::uint64_t>(a[kEnd]);
  transfer.type = static_cast<std::uint32_t>(a[kType]);
  transfer.layer = static_cast<std::uint32_t>(a[kLayer]);
  transfer.bytes_per_row = static_cast<std::uint32_t>(a[kBytes]);
  transfer.advances = a[kAdvances] != 0;
  auto* lane = reinterpret_cast<Lane*>(a[kLane]);
  if (void* chosen = LaneChoice::instead_of(lane)) lane = static_cast<Lane*>(chosen);
  std::int64_t iteration = -1;
  const RecordResult result = lane->record(transfer, &iteration);
  return PyLong_FromLongLong(static_cast<int>(result) < 0 ? static_cast<int>(result) - 1
                                                          : iteration);
}

PyMethodDef kMethods[] = {
    {"push_transfer", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(push_transfer)),
     METH_FASTCALL, "Records a transfer whose counts are on the host."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void register_capture(py::module_& m) {
  m.attr("FLAG_BACKWARD") = kFlagBackward;
  m.attr("FLAG_RECOMPUTE") = kFlagRecompute;
  m.attr("FLAG_UNTIMED") = kFlagUntimed;
  m.attr("FLAG_TOKENS") = kFlagTokens;
  if (PyModule_AddFunctions(m.ptr(), kMethods) != 0) throw py::error_already_set();
}

}  // namespace dodoco
