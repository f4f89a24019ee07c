// One function per family of bindings; module.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>

namespace dodoco {

void register_writer(pybind11::module_& m);
void register_reader(pybind11::module_& m);
void register_ops(pybind11::module_& m);
void register_device(pybind11::module_& m);
void register_capture(pybind11::module_& m);

// What torch says is the calling thread's stream of a device; null where it says nothing. Needs the
// interpreter lock.
void* current_stream(int device);

}  // namespace dodoco
