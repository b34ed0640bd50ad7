// Tensors of a framework without its headers: the exchange table of DLPack 1.3 (the capsule that a tensor class holds
// in `__dlpack_c_exchange_api__`). Reading a tensor takes some 10 ns this way, and 100 ns for each attribute in Python.
// Declares what is used here of https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <Python.h>

#include <cstdint>

#include "core/kernel.h"

namespace lowbit::dlpack {

struct Device {
  int32_t type, id;
};
constexpr int32_t kCpu = 1;

struct Type {
  uint8_t code, bits;
  uint16_t lanes;
  bool operator==(const Type& o) const { return code == o.code && bits == o.bits && lanes == o.lanes; }
};
constexpr Type kInt8{0, 8, 1}, kUint8{1, 8, 1}, kFloat16{2, 16, 1}, kFloat32{2, 32, 1}, kBfloat16{4, 16, 1};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  Type type;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Managed;  // DLManagedTensorVersioned
struct Exchange {
  uint32_t major, minor;
  void* older;
  int (*allocate)(Tensor* like, Managed** out, void* context, void (*error)(void*, const char*, const char*));
  int (*managed_of)(void* object, Managed** out);
  int (*object_of)(Managed* tensor, void** out);  // takes the tensor over
  int (*view)(void* object, Tensor* out);         // borrows from the object
  int (*stream)(int32_t device_type, int32_t device_id, void** out);
};

inline void* address(const Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

inline bool contiguous(const Tensor& t) {
  if (!t.strides) return true;
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

// False for what is not a float dtype of x.
inline bool float_dtype(Type type, Dtype* dtype) {
  if (type == kFloat32) return *dtype = Dtype::kF32, true;
  if (type == kBfloat16) return *dtype = Dtype::kBf16, true;
  if (type == kFloat16) return *dtype = Dtype::kF16, true;
  return false;
}

inline Type type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return kFloat32;
    case Dtype::kBf16:
      return kBfloat16;
    case Dtype::kF16:
      return kFloat16;
    case Dtype::kI8:
    case Dtype::kI7:
      return kInt8;
    default:
      return kUint8;
  }
}

}  // namespace lowbit::dlpack
