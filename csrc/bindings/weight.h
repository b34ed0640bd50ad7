// An n16 weight as Python knows it: what it is, and with the addresses of its tensors.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "bindings/bindings.h"
#include "core/dispatch.h"

namespace lowbit {

// Says what the codes of scales of "dq8" stand for, before the first weight with them.
void use_dynamic_map(const std::array<float, 256>& values);

// What an n16 weight is, apart from its bytes.
struct Weight {
  int64_t n, k, group, table_groups;
  int bits;
  Codec codec;
  Scope scope;
  ZeroMode zero;
  std::optional<Dtype> scale_dtype, zero_dtype, scale2_dtype;
  int64_t scale2_extent;  // weights of a row that share a second level; 0: all of the weight, in fp32
  bool int8_x;            // float activations are quantized to int8
  int64_t x_group;        // weights along k that share a scale of int8 x; 0: the whole row
  float table_step;       // of the table as int8 (core/int8_table.h)
  bool bf16_table;
  bool trits;  // how codes lie (core/trits.h)

  // Throws std::invalid_argument for what contradicts itself.
  Weight(int64_t n, int64_t k, int bits, int64_t group, const std::string& codec_name, const std::string& scope_name,
         int64_t table_groups, const std::string& zero_mode, const std::optional<std::string>& scale,
         const std::optional<std::string>& zero_type, const std::optional<std::string>& scale2, int64_t scale2_extent,
         bool int8_x, int64_t x_group, float table_step, bool bf16_table, bool trits);

  int64_t groups() const;
  int64_t code_bytes() const;
  int64_t lane_terms() const;  // elements of scales, and of zeros
  int64_t table_size() const;
  bool has_zeros2() const { return scale2_dtype && zero == ZeroMode::kAdd; }
  // With int8 x of which each `size` weights have a scale, or, if that is 0, each row.
  void set_x_group(int64_t size);
  Request request(Op op, Dtype x, int64_t m, int threads) const;
  // Without x, results and addresses.
  Launch launch() const;
  // Of the kernel with that index of kernels(), which must serve the request, or, below 0, of the chosen one.
  const Kernel& kernel(const Request& request, int index) const;
};

// A weight with the addresses of its tensors, 0 where there is none. The caller keeps the memory alive.
struct BoundWeight {
  Weight weight;
  Launch launch;  // without x and results
  BoundWeight(const Weight& weight, uint64_t codes, uint64_t scales, uint64_t zeros, uint64_t table, uint64_t scales2,
              uint64_t zeros2);
  // `Weight::set_x_group`, for a product of its own.
  BoundWeight with_x_group(int64_t size) const;
};

}  // namespace lowbit
