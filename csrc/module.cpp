#include "bindings.h"
#include "format.h"

#ifndef DODOCO_VERSION
#define DODOCO_VERSION "0+unknown"
#endif
#ifndef DODOCO_HAS_CUDA
#define DODOCO_HAS_CUDA 0
#endif
#ifndef DODOCO_CUDA_ARCHS
#define DODOCO_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Recordings of MoE routing: writer, reader, and the bodies of the CPU ops.";
  m.attr("version") = DODOCO_VERSION;
  m.attr("format_version") = dodoco::kFormatVersion;
  m.attr("has_cuda") = static_cast<bool>(DODOCO_HAS_CUDA);
  m.attr("cuda_archs") = DODOCO_CUDA_ARCHS;
  dodoco::register_writer(m);
  dodoco::register_reader(m);
  dodoco::register_ops(m);
  dodoco::register_device(m);
  dodoco::register_capture(m);
}
