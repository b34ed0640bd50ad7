#include "bindings/weight.h"

#include <array>

#include "bindings/names.h"
#include "core/address.h"
#include "core/int8_table.h"
#include "core/trits.h"

namespace lowbit {
namespace {
std::optional<std::array<float, 256>> dynamic_map;  // of Dtype::kDq8
}

void use_dynamic_map(const std::array<float, 256>& values) { dynamic_map = values; }

Weight::Weight(int64_t n, int64_t k, int bits, int64_t group, const std::string& codec_name,
               const std::string& scope_name, int64_t table_groups, const std::string& zero_mode,
               const std::optional<std::string>& scale, const std::optional<std::string>& zero_type,
               const std::optional<std::string>& scale2, int64_t scale2_extent, bool int8_x, int64_t x_group,
               float table_step, bool bf16_table, bool trits)
    : n(n),
      k(k),
      group(group < k ? group : k),
      table_groups(table_groups),
      bits(bits),
      scale2_extent(scale2_extent),
      int8_x(int8_x),
      table_step(table_step),
      bf16_table(bf16_table),
      trits(trits) {
  if (n < 0 || k < 1 || n > INT32_MAX || k > INT32_MAX) {
    fail("shape must be (n >= 0, k >= 1) and below 2^31, got (" + std::to_string(n) + ", " + std::to_string(k) + ")");
  }
  if (bits < 1 || bits > 8 || bits == 7) fail("bits must be 1, 2, 3, 4, 5, 6 or 8, got " + std::to_string(bits));
  if (trits && bits != kTritBits) fail("trits need bits 2, got " + std::to_string(bits));
  if (group < 1) fail("group must be positive, got " + std::to_string(group));
  set_x_group(x_group);
  scope = scope_of(scope_name);
  if (table_groups != 1 && (scope != Scope::kColumn || table_groups != groups())) {
    fail("table_groups must be 1 or the number of groups, got " + std::to_string(table_groups));
  }
  codec = codec_of(codec_name);
  if (codec == Codec::kInt) this->bf16_table = true;
  if ((codec == Codec::kE4m3 || codec == Codec::kE5m2) && (bits != 8 || scope != Scope::kShared)) {
    fail("codec " + codec_name + " needs bits 8 and scope shared, got bits " + std::to_string(bits) + " and scope " +
         scope_name);
  }
  if (zero_mode != "none" && zero_mode != "subtract" && zero_mode != "add") {
    fail("zero must be none, subtract or add, got '" + zero_mode + "'");
  }
  zero = zero_mode == "none" ? ZeroMode::kNone : zero_mode == "add" ? ZeroMode::kAdd : ZeroMode::kSubtract;
  if (scale) scale_dtype = dtype_of(*scale);
  if (zero_type) zero_dtype = dtype_of(*zero_type);
  if ((zero == ZeroMode::kNone) != !zero_dtype) fail("zero_dtype must be given if and only if there are zeros");
  const bool packed_scales = scale_dtype && packed_scale_bits(*scale_dtype);
  if (zero_dtype && static_cast<int>(*zero_dtype) >= kDtypes &&
      !(packed_scales && zero == ZeroMode::kAdd && zero_dtype == scale_dtype)) {
    fail("zero_dtype must be a number, or packed as the scales are with zero add, got " + *zero_type);
  }
  if ((scope == Scope::kPair) != (scale_dtype == Dtype::kI7)) {
    fail("scale_dtype int7 needs scope pair, and scope pair it, got scope " + scope_name + " and scale_dtype " +
         scale.value_or("none"));
  }
  if (scope == Scope::kPair && (codec != Codec::kLut || bits < 2 || bits > 4 || zero_dtype || int8_x || !scale2)) {
    fail("scope pair needs codec lut, bits 2, 3 or 4, a second level of scales, no zeros and no int8 x");
  }
  if (packed_scales && !scale2) fail("scale_dtype " + *scale + " needs a second level of scales");
  if (scale_dtype == Dtype::kDq8) {
    if (!scale2) fail("scale_dtype dq8 needs a second level of scales");
    if (*scale2 != "fp32" || scale2_extent != 0) fail("scale2_dtype of dq8 must be fp32 with scale2_extent 0");
    if (n * groups() > INT32_MAX)
      fail("a weight has at most 2^31 - 1 scales of dq8, got " + std::to_string(n * groups()));
    if (!dynamic_map) fail("use_dynamic_map must be called before the first weight with scales of dq8");
  }
  if (!scale2) return;
  scale2_dtype = dtype_of(*scale2);
  if (*scale2_dtype != Dtype::kF32 && *scale2_dtype != Dtype::kF16 && *scale2_dtype != Dtype::kBf16) {
    fail("scale2_dtype must be fp32, fp16 or bf16, got '" + *scale2 + "'");
  }
  if (!scale_dtype) fail("scale2_dtype needs scales");
  if (scale2_extent < 0 || (scale2_extent > 0 && scale2_extent < k && scale2_extent % this->group != 0)) {
    fail("scale2_extent must be a multiple of the group, got " + std::to_string(scale2_extent));
  }
  if (scale2_extent == 0 && *scale2_dtype != Dtype::kF32) fail("scale2_dtype of the whole weight must be fp32");
}

int64_t Weight::groups() const { return ceil_div(k, group); }
int64_t Weight::code_bytes() const { return num_blocks(n) * block_bytes(k, bits, trits); }
int64_t Weight::lane_terms() const { return num_blocks(n) * groups() * kBlockN; }
int64_t Weight::table_size() const {
  if (scope == Scope::kColumn) return (num_blocks(n) * table_groups << bits) * kBlockN;
  return int64_t{1} << (scope == Scope::kPair ? bits + 1 : bits);
}

void Weight::set_x_group(int64_t size) {
  const bool whole_row = size == 0 || size >= k || group >= k;
  if (size < 0 || (!whole_row && group % size != 0 && size % group != 0)) {
    fail("x_group must be 0, or divide the group or be a multiple of it, got " + std::to_string(size));
  }
  x_group = size < k ? size : k;
}

Request Weight::request(Op op, Dtype x, int64_t m, int threads) const {
  if (op == Op::kLinear && int8_x && x != Dtype::kB1) x = Dtype::kI8;
  const bool segments = op == Op::kLinear && x == Dtype::kI8;
  return {.op = op,
          .x = x,
          .codec = codec,
          .bits = bits,
          .scope = scope,
          .zero = zero,
          .m = m,
          .n = n,
          .k = k,
          .group = segments ? segments_of(launch()).size : group,
          .threads = threads,
          .bf16_table = bf16_table};
}

Launch Weight::launch() const {
  Launch l{.n = n,
           .k = k,
           .group = group,
           .num_groups = groups(),
           .x_group = x_group,
           .trits = trits,
           .scale_dtype = scale_dtype.value_or(Dtype::kF32),
           .zero_dtype = zero_dtype.value_or(Dtype::kF32),
           .zero = zero,
           .table_groups = table_groups,
           .table_step = table_step};
  if (!scale2_dtype) return l;
  l.second_dtype = *scale2_dtype;
  if (scale_dtype == Dtype::kDq8) {
    l.num_supers = ceil_div(n * groups(), int64_t{1} << kFactorBits);
    l.scale_map = dynamic_map->data();
    return l;
  }
  if (scale2_extent > 0) {
    l.super_groups = scale2_extent < k ? scale2_extent / group : l.num_groups;
    l.num_supers = ceil_div(l.num_groups, l.super_groups);
  }
  return l;
}

const Kernel& Weight::kernel(const Request& request, int index) const {
  if (index >= 0) {
    if (index >= static_cast<int>(kernels().size()))
      fail("kernel must be the index of an entry of kernels() that is not for FP8 products");
    const Kernel& k = *kernels()[index];
    if (const char* why = rejection(k, request, detect_isa())) fail(std::string(k.name) + ": " + why);
    return k;
  }
  const Kernel* k = select(request, active_isa());
  if (!k) fail("no kernel of this CPU serves this request");
  return *k;
}

BoundWeight::BoundWeight(const Weight& weight, uint64_t codes, uint64_t scales, uint64_t zeros, uint64_t table,
                         uint64_t scales2, uint64_t zeros2)
    : weight(weight), launch(weight.launch()) {
  launch.codes = pointer<const uint8_t>(codes);
  launch.table = pointer<const float>(table);
  if (weight.scale_dtype) launch.scales = pointer<const void>(scales);
  launch.zeros = pointer<const void>(zeros);
  if (weight.scale2_dtype) launch.scales2 = pointer<const void>(scales2);
  if (weight.has_zeros2()) launch.zeros2 = pointer<const void>(zeros2);
}

BoundWeight BoundWeight::with_x_group(int64_t size) const {
  BoundWeight made = *this;
  made.weight.set_x_group(size);
  made.launch.x_group = made.weight.x_group;
  return made;
}

}  // namespace lowbit
