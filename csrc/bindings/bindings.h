// What the bindings have in common: arrays of numpy, and errors that become ValueError.
#pragma once

#include <pybind11/numpy.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/stop.h"

namespace lowbit {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline std::string shape_string(const py::array& a) {
  std::string s = "(";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) {
    if (i) s += ", ";
    s += std::to_string(a.shape(i));
  }
  s += ")";
  return s;
}

inline void want_shape(const char* name, const py::array& a, int64_t rows, int64_t columns) {
  if (a.ndim() != 2 || a.shape(0) != rows || a.shape(1) != columns) {
    fail(std::string(name) + " must have shape (" + std::to_string(rows) + ", " + std::to_string(columns) + "), got " +
         shape_string(a));
  }
}

// Sizes that something is divided by, or whose last element is read: one of 0 would stop the process.
inline void want_positive(std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  for (const auto& [name, size] : sizes) {
    if (size < 1) fail(std::string(name) + " must be at least 1, got " + std::to_string(size));
  }
}

// Runs fn(Stop*) without the GIL; raises what the handler of a signal raises (KeyboardInterrupt), after fn returned.
template <class Fn>
void run_unlocked(const Fn& fn) {
  Stop stop([] {
    const py::gil_scoped_acquire locked;
    return PyErr_CheckSignals() != 0;
  });
  {
    const py::gil_scoped_release released;
    fn(&stop);
  }
  if (stop.stopped()) throw py::error_already_set();
}

}  // namespace lowbit
