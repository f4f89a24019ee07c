#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>

#include "bindings.h"
#include "divisor.h"
#include "recording_writer.h"

namespace py = pybind11;

namespace dodoco {
namespace {

// (layer, ranks, slots [P]: logical expert | rank << 16)
using Placed = std::tuple<std::uint32_t, std::uint32_t,
                          py::array_t<std::uint32_t, py::array::c_style | py::array::forcecast>>;

std::int64_t record_placement(RecordingWriter& writer, const std::vector<Placed>& layers) {
  std::vector<LayerPlacement> placements;
  placements.reserve(layers.size());
  for (const auto& [layer, num_ranks, slots] : layers)
    placements.push_back({layer, num_ranks, {slots.data(), slots.data() + slots.size()}});
  return writer.record_placement(placements);
}

}  // namespace

void register_writer(py::module_& m) {
  m.attr("SITE_BYTES") = sizeof(Site);
  m.attr("MAX_LANES") = kMaxLanes;
  m.attr("MAX_RANKS") = kMaxRanks;
  m.attr("MAX_SLOTS") = kMaxSlots;
  m.attr("MAX_KEPT") = kMaxKept;
  m.attr("EMPTY_SLOT") = kEmptySlot;

  py::enum_<Fault>(m, "Fault")
      .value("NONE", Fault::kNone)
      .value("UNSUPPORTED_DTYPE", Fault::kUnsupportedDtype)
      .value("BAD_SHAPE", Fault::kBadShape)
      .value("TOO_LARGE", Fault::kTooLarge)
      .value("UNSUPPORTED_DEVICE", Fault::kUnsupportedDevice)
      .value("COPIED_SITE", Fault::kCopiedSite)
      .value("INTERNAL", Fault::kInternal)
      .value("NO_DEVICE", Fault::kNoDevice)
      .value("NO_LANE", Fault::kNoLane)
      .value("DEVICE_ERROR", Fault::kDeviceError)
      .value("UNATTRIBUTED", Fault::kUnattributed);

  // The settings of a lane that may change while it records. Lanes are never freed.
  py::class_<Lane, std::unique_ptr<Lane, py::nodelete>>(m, "Lane")
      .def_property_readonly(
          "address", [](const Lane& lane) { return reinterpret_cast<std::uintptr_t>(&lane); })
      .def_property(
          "enabled", [](Lane& lane) { return lane.control()->enabled != 0; },
          [](Lane& lane, bool value) { lane.control()->enabled = value; })
      .def_property(
          "record_every", [](Lane& lane) { return lane.control()->record_every; },
          [](Lane& lane, std::uint32_t value) { set_record_every(lane.control(), value); })
      .def_property(
          "num_valid", [](Lane& lane) { return lane.control()->num_valid; },
          [](Lane& lane, std::int64_t value) { lane.control()->num_valid = value; })
      .def_property(
          "map_version", [](Lane& lane) { return lane.control()->map_version; },
          [](Lane& lane, std::uint32_t value) { lane.control()->map_version = value; })
      .def_property(
          "microbatch", [](Lane& lane) { return lane.control()->microbatch; },
          [](Lane& lane, std::uint16_t value) { lane.control()->microbatch = value; });

  py::class_<LaneChoice>(m, "LaneChoice")
      .def(py::init([](const Lane* usual, Lane* chosen) { return new LaneChoice(usual, chosen); }),
           py::arg("usual"), py::arg("chosen"));

  py::class_<RecordingWriter>(m, "RecordingWriter")
      .def(py::init([](std::string path, std::string metadata,
                       const std::vector<std::pair<std::uint32_t, std::uint32_t>>& layers,
                       std::uint32_t num_lanes, std::uint64_t max_bytes, std::uint32_t mode,
                       std::uint32_t rank, std::uint32_t world_size, std::uint32_t group_size,
                       std::uint32_t group_index, std::uint32_t num_slots,
                       std::uint32_t kept_placements) {
             RecordingSpec spec{std::move(path),
                                std::move(metadata),
                                {},
                                num_lanes,
                                max_bytes,
                                mode,
                                rank,
                                world_size,
                                group_size,
                                group_index,
                                num_slots,
                                kept_placements};
             for (const auto& [num_experts, top_k] : layers)
               spec.layers.push_back({num_experts, top_k});
             try {
               return new RecordingWriter(spec);
             } catch (const std::system_error& error) {
               const py::object raised = py::reinterpret_borrow<py::object>(PyExc_OSError)(
                   error.code().value(), error.what());
               PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(raised.ptr())), raised.ptr());
               throw py::error_already_set();
             }
           }),
           py::arg("path"), py::arg("metadata"), py::arg("layers"), py::kw_only(),
           py::arg("num_lanes") = 1, py::arg("max_bytes") = std::uint64_t{8} << 20,
           py::arg("mode") = 0600, py::arg("rank") = 0, py::arg("world_size") = 1,
           py::arg("group_size") = 0, py::arg("group_index") = 0, py::arg("num_slots") = 0,
           py::arg("kept_placements") = 0)
      .def("lane", &RecordingWriter::lane, py::return_value_policy::reference)
      .def(
          "bind_site",
          [](RecordingWriter& writer, std::uintptr_t address, std::uint32_t lane,
             std::uint64_t layer) {
            writer.bind_site(reinterpret_cast<void*>(address), lane, layer);
          },
          py::arg("address"), py::arg("lane"), py::arg("layer"))
      .def("add_fault", &RecordingWriter::add_fault)
      .def("record_placement", &record_placement, py::arg("layers"))
      .def("close", &RecordingWriter::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("closed", &RecordingWriter::closed)
      .def_property_readonly("num_slots", &RecordingWriter::num_slots)
      .def_property_readonly("file_bytes", &RecordingWriter::file_bytes);
}

}  // namespace dodoco
