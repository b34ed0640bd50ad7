// Calls on a framework's tensors without its headers, and without a Python attribute look-up for each operand.
#include "bindings/tensor_call.h"

#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "bindings/dlpack.h"
#include "core/address.h"
#include "core/n16.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace py = pybind11;

namespace lowbit {
namespace {

const dlpack::Exchange* exchange = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
bool poison_outputs = false;

constexpr const char* kPlanName = "lowbit plan";
constexpr int kMaxDims = 8;
constexpr int kOperands = 7;  // codes, scales, zeros, table, scales2, zeros2, bias

bool view(PyObject* object, dlpack::Tensor* t) {
  if (Py_TYPE(object) != tensor_type && Py_TYPE(object) != parameter_type) return false;
  if (exchange->view(object, t) != 0) {
    PyErr_Clear();
    return false;
  }
  return t->device.type == dlpack::kCpu;
}

// The address of an operand, if it is exactly what a kernel reads: a contiguous tensor of this type and size.
bool operand(PyObject* object, bool wanted, dlpack::Type type, std::initializer_list<int64_t> shape,
             uint64_t* address) {
  *address = 0;
  if (object == Py_None || !wanted) return object == Py_None && !wanted;
  dlpack::Tensor t;
  if (!view(object, &t) || !(t.type == type) || t.ndim != static_cast<int>(shape.size())) return false;
  int i = 0;
  for (int64_t size : shape) {
    if (t.shape[i++] != size) return false;
  }
  *address = reinterpret_cast<uintptr_t>(dlpack::address(t));
  return dlpack::contiguous(t);
}

// (..., n) in the type of x; null with an exception set if there is no memory.
PyObject* empty_like_rows(const dlpack::Tensor& x, int64_t n, dlpack::Tensor* out) {
  int64_t shape[kMaxDims];
  for (int i = 0; i + 1 < x.ndim; ++i) shape[i] = x.shape[i];
  shape[x.ndim - 1] = n;
  dlpack::Tensor like = x;
  like.shape = shape;
  like.strides = nullptr;
  dlpack::Managed* made = nullptr;
  const auto raise = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_MemoryError, message); };
  void* object = nullptr;
  if (exchange->allocate(&like, &made, nullptr, raise) != 0 || exchange->object_of(made, &object) != 0 ||
      exchange->view(object, out) != 0) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_MemoryError, "no memory for the result");
    Py_XDECREF(static_cast<PyObject*>(object));
    return nullptr;
  }
  return static_cast<PyObject*>(object);
}

const Kernel& choose(Plan& plan, Dtype x, int64_t m, int threads) {
  threads = usable_threads(threads);
  Plan::Choice& last = plan.chosen[static_cast<int>(x)];
  if (last.m != m || last.threads != threads) {
    Request request = plan.request;
    if (request.x != Dtype::kI8) request.x = x;
    request.m = m;
    request.threads = threads;
    const Kernel* kernel = select(request, active_isa());
    if (!kernel) throw std::invalid_argument("no kernel of this CPU serves this request");
    last = {m, threads, kernel};
  }
  return *last.kernel;
}

struct Input {
  dlpack::Tensor tensor;
  Dtype dtype;
  int64_t m, k;
};

bool read_input(PyObject* object, Input* x) {
  dlpack::Tensor& t = x->tensor;
  if (!exchange || !view(object, &t) || t.ndim < 1 || t.ndim > kMaxDims || !dlpack::float_dtype(t.type, &x->dtype) ||
      !dlpack::contiguous(t)) {
    return false;
  }
  x->m = 1;
  for (int i = 0; i + 1 < t.ndim; ++i) x->m *= t.shape[i];
  x->k = t.shape[t.ndim - 1];
  return x->m > 0;
}

bool second_level(bool wanted, PyObject* object, Launch* l, const void** to) {
  uint64_t address;
  const bool one_vector = l->num_supers == 0 || l->scale_dtype == Dtype::kDq8;  // of one number, or factors and offset
  const bool given = one_vector ? operand(object, wanted, dlpack::kFloat32, {l->num_supers + 1}, &address)
                                : operand(object, wanted, dlpack::type_of(l->second_dtype),
                                          {num_blocks(l->n), l->num_supers, kBlockN}, &address);
  *to = pointer<const void>(address);
  return given;
}

// Fills all of the launch but the result; false if a tensor is not plainly what a kernel reads.
bool read_operands(const Plan& plan, const Input& x, PyObject* const operands[kOperands], Launch* l) {
  *l = plan.launch;
  if (x.k != l->k || l->n == 0) return false;
  const int64_t blocks = num_blocks(l->n), groups = l->num_groups, entries = int64_t{1} << plan.request.bits;
  const dlpack::Type scale_type = dlpack::type_of(l->scale_dtype), zero_type = dlpack::type_of(l->zero_dtype);
  const auto lanes = [](Dtype d) {
    const int bits = packed_scale_bits(d);
    return bits ? kBlockN * bits / 8 : kBlockN;
  };
  const auto table_given = [&](PyObject* object, uint64_t* address) {
    switch (plan.request.scope) {
      case Scope::kColumn:
        return operand(object, true, dlpack::kFloat32, {blocks, l->table_groups, entries, kBlockN}, address);
      case Scope::kPair:
        return operand(object, true, dlpack::kFloat32, {2, entries}, address);
      default:
        return operand(object, true, dlpack::kFloat32, {entries}, address);
    }
  };
  uint64_t codes, scales, zeros, table;
  if (!operand(operands[0], true, dlpack::kUint8, {plan.code_bytes}, &codes) ||
      !operand(operands[1], plan.has_scales, scale_type, {blocks, groups, lanes(l->scale_dtype)}, &scales) ||
      !operand(operands[2], plan.has_zeros, zero_type, {blocks, groups, lanes(l->zero_dtype)}, &zeros) ||
      !table_given(operands[3], &table)) {
    return false;
  }
  l->codes = pointer<const uint8_t>(codes);
  l->scales = pointer<const void>(scales);
  l->zeros = pointer<const void>(zeros);
  l->table = pointer<const float>(table);
  if (!second_level(plan.has_scales2, operands[4], l, &l->scales2) ||
      !second_level(plan.has_zeros2, operands[5], l, &l->zeros2)) {
    return false;
  }
  if (operands[6] != Py_None) {
    dlpack::Tensor b;
    if (!view(operands[6], &b) || !dlpack::float_dtype(b.type, &l->bias_dtype) || b.ndim != 1 || b.shape[0] != l->n ||
        !dlpack::contiguous(b)) {
      return false;
    }
    l->bias = dlpack::address(b);
  }
  l->m = x.m;
  l->x = dlpack::address(x.tensor);
  l->x_dtype = l->out_dtype = x.dtype;
  l->x_stride = l->k;
  l->out_stride = l->n;
  return true;
}

PyObject* make_output(const Input& x, Launch* l) {
  dlpack::Tensor out;
  PyObject* result = empty_like_rows(x.tensor, l->n, &out);
  if (!result) return nullptr;
  l->out = dlpack::address(out);
  if (poison_outputs) std::memset(l->out, 0xFF, static_cast<size_t>(x.m * l->n) * x.tensor.type.bits / 8);
  return result;
}

// False with an exception set.
bool choose_and_run(Plan* const* plans, std::span<Call> calls, const Input& x, int threads) {
  try {
    for (size_t i = 0; i < calls.size(); ++i) calls[i].kernel = &choose(*plans[i], x.dtype, x.m, threads);
    py::gil_scoped_release unlocked;
    run_many(calls, threads);
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return false;
  }
  return true;
}

Plan* plan_of(PyObject* object) { return static_cast<Plan*>(PyCapsule_GetPointer(object, kPlanName)); }

// linear_tensors(plan, threads, x, codes, scales, zeros, table, scales2, zeros2, bias): the product, or None if a
// tensor is not plainly what the kernels read: another way must then find out why. Never raises for that.
PyObject* linear_tensors(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 + kOperands) return PyErr_Format(PyExc_TypeError, "linear_tensors takes 10 arguments, got %zd", count);
  if (args[0] == Py_None) Py_RETURN_NONE;
  Plan* plan = plan_of(args[0]);
  const int threads = static_cast<int>(PyLong_AsLong(args[1]));
  if (!plan || PyErr_Occurred()) return nullptr;
  Input x;
  Call call{};
  if (!read_input(args[2], &x) || !read_operands(*plan, x, args + 3, &call.launch)) Py_RETURN_NONE;
  PyObject* result = make_output(x, &call.launch);
  if (result && !choose_and_run(&plan, {&call, 1}, x, threads)) Py_CLEAR(result);
  return result;
}

// linear_many_tensors(plans, threads, x, codes, scales, zeros, table, scales2, zeros2, bias): the same for lists; a
// list of products.
PyObject* linear_many_tensors(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 + kOperands) {
    return PyErr_Format(PyExc_TypeError, "linear_many_tensors takes 10 arguments, got %zd", count);
  }
  const int threads = static_cast<int>(PyLong_AsLong(args[1]));
  if (PyErr_Occurred()) return nullptr;
  const Py_ssize_t size = PyList_Check(args[0]) ? PyList_GET_SIZE(args[0]) : -1;
  for (int i = 3; i < 3 + kOperands; ++i) {
    if (!PyList_Check(args[i]) || PyList_GET_SIZE(args[i]) != size) Py_RETURN_NONE;
  }
  Input x;
  if (!read_input(args[2], &x)) Py_RETURN_NONE;
  std::vector<Call> calls(static_cast<size_t>(size));
  std::vector<Plan*> plans(calls.size());
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* operands[kOperands];
    for (int j = 0; j < kOperands; ++j) operands[j] = PyList_GET_ITEM(args[3 + j], i);
    if (PyList_GET_ITEM(args[0], i) == Py_None) Py_RETURN_NONE;
    plans[i] = plan_of(PyList_GET_ITEM(args[0], i));
    if (!plans[i]) return nullptr;
    if (!read_operands(*plans[i], x, operands, &calls[i].launch)) Py_RETURN_NONE;
  }
  PyObject* results = PyList_New(size);
  for (Py_ssize_t i = 0; results && i < size; ++i) {
    PyObject* result = make_output(x, &calls[i].launch);
    if (result) {
      PyList_SET_ITEM(results, i, result);
    } else {
      Py_CLEAR(results);
    }
  }
  if (results && !choose_and_run(plans.data(), calls, x, threads)) Py_CLEAR(results);
  return results;
}

PyCFunction fast(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}
PyMethodDef methods[] = {
    {"linear_tensors", fast(linear_tensors), METH_FASTCALL, nullptr},
    {"linear_many_tensors", fast(linear_many_tensors), METH_FASTCALL, nullptr},
};

// Whether `linear_tensors` can read tensors of this class; false for a table of another major version.
bool use_tensor_class(const py::type& tensor, const py::type& parameter) {
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return false;
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* found = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!found) throw py::error_already_set();
  if (found->major != 1 || !found->view) return false;
  exchange = found;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  return true;
}

}  // namespace

py::capsule make_plan(const Plan& plan) {
  return py::capsule(new Plan(plan), kPlanName,
                     [](PyObject* o) { delete static_cast<Plan*>(PyCapsule_GetPointer(o, kPlanName)); });
}

void bind_tensor_calls(py::module_& m) {
  m.def("use_tensor_class", &use_tensor_class, py::arg("tensor"), py::arg("parameter"));
  m.def(
      "poison_outputs", [](bool on) { poison_outputs = on; },
      "Fills results of linear_tensors before the kernels run.");
  m.def("poison_scratch", &poison_scratch,
        "What kernels keep between calls is new, poisoned and guarded (core/scratch.h).");
  for (PyMethodDef& method : methods) {
    m.attr(method.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
  }
}

}  // namespace lowbit
