// What Python calls the enumerators of core/kernel.h.
#pragma once

#include <iterator>
#include <string>

#include "bindings/bindings.h"
#include "core/isa.h"
#include "core/kernel.h"

namespace lowbit {

// By Dtype.
inline constexpr const char* kDtypeNames[] = {"fp32", "bf16",  "fp16",  "int8", "b1",  "e4m3",
                                              "e8m0", "uint4", "uint6", "int6", "dq8", "int7"};
inline const char* dtype_name(Dtype dtype) { return kDtypeNames[static_cast<int>(dtype)]; }
inline Dtype dtype_of(const std::string& name) {
  for (size_t i = 0; i < std::size(kDtypeNames); ++i) {
    if (name == kDtypeNames[i]) return static_cast<Dtype>(i);
  }
  fail(
      "dtype must be fp32, bf16, fp16, int8 or b1, and of scales also e4m3, e8m0, uint4, uint6, int6, dq8 or int7, "
      "got '" +
      name + "'");
}

// By Codec.
inline constexpr const char* kCodecNames[] = {"lut", "int", "e4m3", "e5m2"};
inline Codec codec_of(const std::string& name) {
  for (size_t i = 0; i < std::size(kCodecNames); ++i) {
    if (name == kCodecNames[i]) return static_cast<Codec>(i);
  }
  fail("codec must be lut, int, e4m3 or e5m2, got '" + name + "'");
}

// By Scope.
inline constexpr const char* kScopeNames[] = {"shared", "column", "pair"};
inline Scope scope_of(const std::string& name) {
  for (size_t i = 0; i < std::size(kScopeNames); ++i) {
    if (name == kScopeNames[i]) return static_cast<Scope>(i);
  }
  fail("scope must be shared, column or pair, got '" + name + "'");
}

inline Op op_of(const std::string& name) {
  if (name == "linear") return Op::kLinear;
  if (name == "dequantize") return Op::kDequantize;
  fail("op must be linear or dequantize, got '" + name + "'");
}

// The instruction sets up to a named one that this CPU has; those in use for an empty name.
inline uint32_t mask_of(const std::string& isa) {
  return isa.empty() ? active_isa() : cap_isa(detect_isa(), isa.c_str());
}

}  // namespace lowbit
