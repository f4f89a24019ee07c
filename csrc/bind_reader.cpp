#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>

#include "bindings.h"
#include "recording_reader.h"

namespace py = pybind11;

namespace dodoco {
namespace {

py::dict header_of(const RecordingReader& reader) {
  const FileHeader h = reader.header();
  py::dict d;
  d["format_version"] = h.format_version;
  d["file_bytes"] = h.file_bytes;
  d["closed"] = h.state == static_cast<std::uint32_t>(FileState::kClosed);
  d["created_unix_ns"] = h.created_unix_ns;
  d["created_monotonic_ns"] = h.created_monotonic_ns;
  d["closed_unix_ns"] = h.closed_unix_ns;
  d["owner_pid"] = h.owner_pid;
  d["rank"] = h.rank;
  d["world_size"] = h.world_size;
  d["num_lanes"] = h.num_lanes;
  d["num_faults"] = h.num_faults;
  d["last_fault"] = h.last_fault;
  d["faults"] =
      py::tuple(py::cast(std::vector<std::uint64_t>(h.faults, h.faults + kFaultCounters)));
  d["uuid"] = py::bytes(reinterpret_cast<const char*>(h.uuid), sizeof(h.uuid));
  return d;
}

// (words, consistent)
py::tuple board_of(const RecordingReader& reader, std::uint32_t lane, std::uint32_t layer) {
  const auto words =
      static_cast<py::ssize_t>(board_block_words(reader.layers().at(layer).num_experts));
  py::array_t<std::uint64_t> out(words);
  const bool consistent = reader.read_board(lane, layer, out.mutable_data());
  return py::make_tuple(out, consistent);
}

// (bytes of RouteRecords [uint8], next position, lost, of unknown type)
py::tuple ring_of(const RecordingReader& reader, std::uint32_t lane, std::uint64_t position,
                  std::uint64_t limit) {
  auto read = std::make_unique<RingRead>(reader.read_ring(lane, position, limit));
  const RingRead& r = *read;
  const auto bytes = static_cast<py::ssize_t>(r.records.size() * sizeof(RouteRecord));
  const auto* data = reinterpret_cast<const std::uint8_t*>(r.records.data());
  const py::capsule owner(read.release(),
                          [](void* pointer) { delete static_cast<RingRead*>(pointer); });
  return py::make_tuple(py::array_t<std::uint8_t>(bytes, data, owner), r.next, r.lost, r.unknown);
}

template <typename T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// (bytes of TransferRecords [uint8], their counts [uint32], next position, lost)
py::tuple transfers_of(const RecordingReader& reader, std::uint32_t lane, std::uint64_t position) {
  const RingRead r = reader.read_ring(lane, position, UINT64_MAX);
  const auto bytes = static_cast<py::ssize_t>(r.transfers.size() * sizeof(TransferRecord));
  const auto* data = reinterpret_cast<const std::uint8_t*>(r.transfers.data());
  return py::make_tuple(py::array_t<std::uint8_t>(bytes, data), array_of(r.counts), r.next, r.lost);
}

// (words, consistent)
py::tuple traffic_of(const RecordingReader& reader, std::uint32_t lane, std::uint64_t block) {
  py::array_t<std::uint64_t> out(
      static_cast<py::ssize_t>(traffic_block_words(reader.group_size())));
  const bool consistent = reader.read_traffic(lane, block, out.mutable_data());
  return py::make_tuple(out, consistent);
}

// ([(version, ranks, time_ns, iteration, counts [uint64], slots [uint32])], lost)
py::tuple placements_of(const RecordingReader& reader, std::uint32_t layer) {
  const PlacementRead read = reader.read_placements(layer);
  py::list entries;
  for (const PlacementRecord& e : read.entries) {
    entries.append(py::make_tuple(e.version, e.num_ranks, e.time_ns, e.iteration,
                                  array_of(e.counts), array_of(e.slots)));
  }
  return py::make_tuple(entries, read.lost);
}

// Raised by hand, because the exception carries why the file cannot be read.
void translate(std::exception_ptr thrown, PyObject* type) {
  try {
    if (thrown) std::rethrow_exception(std::move(thrown));
  } catch (const RecordingError& error) {
    const py::object raised = py::reinterpret_borrow<py::object>(type)(error.what());
    raised.attr("state") = name_of(error.problem());
    PyErr_SetObject(type, raised.ptr());
  }
}

}  // namespace

void register_reader(py::module_& m) {
  static const py::handle error_type =
      py::exception<RecordingError>(m, "RecordingError", PyExc_OSError).release();
  py::register_exception_translator(
      [](std::exception_ptr thrown) { translate(std::move(thrown), error_type.ptr()); });
  m.attr("TRAFFIC_WORDS") = static_cast<std::uint32_t>(kTrafficWords);
  m.attr("BOARD_WORDS") = static_cast<std::uint32_t>(kBoardWords);
  m.attr("SIZE_CLASSES") = kSizeClasses;
  m.attr("GINI_BINS") = kGiniBins;
  m.attr("MAX_MEAN_BINS") = kMaxMeanBins;
  py::list bounds;
  for (const std::uint32_t eighths : kMaxMeanEighths) bounds.append(eighths / 8.0);
  m.attr("MAX_MEAN_BOUNDS") = py::tuple(bounds);

  m.def("owner_alive",
        [](const std::string& path) { return recording_owner(path) == Owner::kAlive; });

  py::class_<RecordingReader>(m, "RecordingReader")
      .def(py::init<const std::string&>(), py::arg("path"))
      .def("header", &header_of)
      .def("owner_alive",
           [](const RecordingReader& reader) { return reader.owner() == Owner::kAlive; })
      .def("metadata", [](const RecordingReader& reader) { return py::bytes(reader.metadata()); })
      .def("layers",
           [](const RecordingReader& reader) {
             py::list layers;
             for (const LayerEntry& layer : reader.layers())
               layers.append(py::make_tuple(layer.num_experts, layer.top_k));
             return layers;
           })
      .def_property_readonly("num_lanes", &RecordingReader::num_lanes)
      .def("num_slots", &RecordingReader::num_slots, py::arg("lane"))
      .def("head", &RecordingReader::head, py::arg("lane"))
      .def("board", &board_of, py::arg("lane"), py::arg("layer"))
      .def_property_readonly("group_size", &RecordingReader::group_size)
      .def_property_readonly("group_index", &RecordingReader::group_index)
      .def("traffic", &traffic_of, py::arg("lane"), py::arg("block"))
      .def("placements", &placements_of, py::arg("layer"))
      .def("placements_recorded", &RecordingReader::placements_recorded)
      .def_property_readonly("placements_kept", &RecordingReader::placements_kept)
      .def("transfers", &transfers_of, py::arg("lane"), py::arg("position"))
      .def("ring", &ring_of, py::arg("lane"), py::arg("position"), py::arg("limit") = UINT64_MAX);
}

}  // namespace dodoco
