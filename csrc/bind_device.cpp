#include <pybind11/stl.h>

#include <tuple>
#include <variant>
#include <vector>

#include "bindings.h"
#include "cuda_driver.h"
#include "device_lanes.h"
#include "device_registry.h"

#ifndef DODOCO_HAS_CUDA
#define DODOCO_HAS_CUDA 0
#endif

namespace py = pybind11;

namespace dodoco {
namespace {

cuda::Stream stream_at(std::uintptr_t handle) { return reinterpret_cast<cuda::Stream>(handle); }

// A lane of a device that the calling thread chose.
struct DeviceLaneChoice : LaneChoice {
  DeviceLaneChoice(DeviceLanes* lanes, std::uint32_t lane)
      : LaneChoice(lanes, lanes->reserve(lane)) {}
};

// Where counts lie on the device: (address, size, stride, is_wide). Else they are a list.
using OnDevice = std::tuple<std::uintptr_t, std::uint32_t, std::int64_t, bool>;
using AnyCounts = std::variant<std::vector<std::uint32_t>, OnDevice>;

Counts counts_in(const AnyCounts& any, std::vector<std::uint32_t>* constants) {
  if (const auto* list = std::get_if<std::vector<std::uint32_t>>(&any)) {
    constants->insert(constants->end(), list->begin(), list->end());
    return {nullptr, 1, static_cast<std::uint32_t>(list->size()), 0};
  }
  const auto& [address, size, stride, is_wide] = std::get<OnDevice>(any);
  return {reinterpret_cast<const void*>(address), stride, size, is_wide};
}

int end_on_device(DeviceLanes& lanes, std::uint32_t type, std::uint32_t layer,
                  std::int64_t iteration, bool advances, std::uint32_t begin_slot,
                  std::uint64_t begin_ns, std::uint32_t bytes_per_row, const AnyCounts& sent,
                  const AnyCounts& received, const AnyCounts& experts, std::uintptr_t stream) {
  std::vector<std::uint32_t> constants;
  Transfer transfer{};
  transfer.sent = counts_in(sent, &constants);
  transfer.received = counts_in(received, &constants);
  transfer.experts = counts_in(experts, &constants);
  transfer.iteration = iteration;
  transfer.begin_ns = begin_ns;
  transfer.type = type;
  transfer.layer = layer;
  transfer.bytes_per_row = bytes_per_row;
  transfer.advances = advances;
  transfer.begin_slot = begin_slot;
  const py::gil_scoped_release others_may_run;
  return static_cast<int>(lanes.end_transfer(transfer, constants, stream_at(stream)));
}

#if DODOCO_HAS_CUDA
extern "C" const char dodoco_fatbin_capture[], dodoco_fatbin_capture_end[];
#endif

// The kernels of capture.cu; empty where they were not built.
py::bytes transfer_code() {
#if DODOCO_HAS_CUDA
  const auto begin = reinterpret_cast<std::uintptr_t>(dodoco_fatbin_capture);
  const auto end = reinterpret_cast<std::uintptr_t>(dodoco_fatbin_capture_end);
  return {dodoco_fatbin_capture, end - begin};
#else
  return {};
#endif
}

}  // namespace

void register_device(py::module_& m) {
  // NOLINTNEXTLINE(performance-unnecessary-value-param): the type is pybind11's
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const cuda::Error& error) {
      PyErr_SetString(PyExc_OSError, error.what());
    }
  });
  m.def(
      "switch_off_device_site",
      [](std::uint64_t site) {
        if (DeviceLanes* lanes = device_registry::of_site(site)) lanes->switch_off(site);
      },
      py::arg("site"));
  m.def("transfer_code", &transfer_code);
  m.attr("TRANSFERS_AT_ONCE") = kTransfersAtOnce;
  m.def("device_capability", &cuda::capability, py::arg("device"));

  // Never freed, as lanes are not: a captured graph or compiled code may still name them.
  py::class_<DeviceLanes, std::unique_ptr<DeviceLanes, py::nodelete>>(m, "DeviceLanes")
      .def(py::init<RecordingWriter*, int, std::uint32_t, std::uint32_t>(), py::arg("writer"),
           py::arg("device"), py::arg("first_lane"), py::arg("num_lanes"), py::keep_alive<1, 2>())
      .def(
          "add_kernel",
          [](DeviceLanes& lanes, int form, int id_bytes, bool shared, std::uint32_t num_experts,
             std::uint32_t block_k, std::int64_t rows_per_program, std::uint32_t max_programs,
             std::int64_t max_rows, std::string name, std::uint32_t num_warps,
             std::uint32_t shared_bytes, const py::bytes& code) {
            lanes.add_kernel({static_cast<ChoiceForm>(form), id_bytes, shared, num_experts, block_k,
                              rows_per_program, max_programs, max_rows, std::move(name), num_warps,
                              shared_bytes, code});
          },
          py::arg("form"), py::arg("id_bytes"), py::arg("shared"), py::arg("num_experts"),
          py::arg("block_k"), py::arg("rows_per_program"), py::arg("max_programs"),
          py::arg("max_rows"), py::arg("name"), py::arg("num_warps"), py::arg("shared_bytes"),
          py::arg("code"))
      .def(
          "calibrate_clock",
          [](DeviceLanes& lanes, const std::string& name, const py::bytes& code) {
            lanes.calibrate_clock(name, code);
          },
          py::arg("name"), py::arg("code"))
      .def(
          "add_transfers",
          [](DeviceLanes& lanes, const py::bytes& code) { lanes.add_transfers(code); },
          py::arg("code"))
      .def(
          "begin_transfer",
          [](DeviceLanes& lanes, std::uint32_t slot, std::uintptr_t stream) {
            const py::gil_scoped_release others_may_run;
            return static_cast<int>(lanes.begin_transfer(slot, stream_at(stream)));
          },
          py::arg("slot"), py::arg("stream"))
      .def("end_transfer", &end_on_device, py::arg("kind"), py::arg("layer"), py::arg("iteration"),
           py::arg("advances"), py::arg("begin_slot"), py::arg("begin_ns"),
           py::arg("bytes_per_row"), py::arg("sent"), py::arg("received"), py::arg("experts"),
           py::arg("stream"))
      .def("site_address", &DeviceLanes::site_address, py::arg("layer"))
      .def(
          "set",
          [](DeviceLanes& lanes, std::uint32_t lane, const std::string& name, std::int64_t value,
             std::uintptr_t stream) { lanes.set(lane, name, value, stream_at(stream)); },
          py::arg("lane"), py::arg("name"), py::arg("value"), py::arg("stream"),
          py::call_guard<py::gil_scoped_release>())
      .def("get", &DeviceLanes::get, py::arg("lane"), py::arg("name"))
      .def("close",
           [](DeviceLanes& lanes) {
             if (lanes.closed()) return;
             auto* stream = static_cast<cuda::Stream>(current_stream(lanes.device()));
             const py::gil_scoped_release others_may_run;
             lanes.close(stream);
           })
      .def_property_readonly("num_lanes", &DeviceLanes::num_lanes)
      .def_property_readonly("device", &DeviceLanes::device)
      .def_property_readonly("captured", &DeviceLanes::captured)
      .def_property_readonly("closed", &DeviceLanes::closed);

  py::class_<DeviceLaneChoice>(m, "DeviceLaneChoice")
      .def(py::init<DeviceLanes*, std::uint32_t>(), py::arg("lanes"), py::arg("lane"));
}

}  // namespace dodoco
