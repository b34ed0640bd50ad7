#include "decoder/decoder.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "core/costs.h"
#include "core/dispatch.h"
#include "core/int8_table.h"
#include "core/n16.h"
#include "core/nonfinite.h"
#include "core/parallel.h"
#include "core/registry.h"
#include "cpu/activations/quantize.h"
#include "decoder/worker.h"
#include "units.h"

namespace lowbit {

LOWBIT_REGISTRY(decoder)

const DecoderOps& decoder_ops(uint32_t isa_mask) { return *newest(units::decoder::kAll, isa_mask).given; }

namespace {

constexpr int64_t padded(int64_t n) { return ceil_div(n, kRowAlign) * kRowAlign; }
constexpr size_t align64(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Hands out consecutive pieces of one allocation whose size is found by a first pass without memory.
class Pieces {
 public:
  explicit Pieces(char* base) : base_(base) {}
  char* take(size_t bytes) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += align64(bytes);
    return piece;
  }
  bool memory() const { return base_ != nullptr; }
  float* floats(int64_t count) { return reinterpret_cast<float*>(take(static_cast<size_t>(count) * sizeof(float))); }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

template <class Fn>
Memory lay_out(const Fn& fn) {
  Pieces sizes(nullptr);
  fn(sizes);
  Memory memory(sizes.used());
  Pieces pieces(memory.data());
  fn(pieces);
  return memory;
}

}  // namespace

Memory::Memory(size_t bytes) : owner_(std::calloc(bytes + 64, 1)) {
  if (!owner_) throw std::bad_alloc();
  const uintptr_t address = reinterpret_cast<uintptr_t>(owner_.get());
  aligned_ = reinterpret_cast<char*>((address + 63) / 64 * 64);
}
void Memory::Free::operator()(void* p) const { std::free(p); }

namespace {

// Given a scale, codes and scales of x stand before what the kernel prepares of them.
size_t codes_bytes(const Launch& l) { return align64(static_cast<size_t>(l.m * l.k)); }
size_t given_bytes(const Launch& l) { return codes_bytes(l) + align64(static_cast<size_t>(l.m) * sizeof(float)); }

}  // namespace

size_t Projection::Part::bytes() const {
  return align64(lowbit::prepared_bytes(*kernel, launch)) + (x_scale > 0 ? given_bytes(launch) : 0);
}

void Projection::Part::place(char* prepared) {
  launch.x = x;
  launch.x_dtype = launch.out_dtype;
  launch.x_stride = x_stride;
  if (x_scale > 0) {
    launch.x = prepared;
    launch.x_dtype = Dtype::kI8;
    launch.x_stride = launch.k;
    launch.x_scales = reinterpret_cast<float*>(prepared + codes_bytes(launch));
    prepared += given_bytes(launch);
  }
  place_prepared(*kernel, prepared, &launch);
}

void Projection::Part::prepare(int64_t begin, int64_t end) const {
  if (x_scale > 0) {
    std::fill(launch.x_scales + begin, launch.x_scales + end, x_scale);
    const QuantizeInt8 request{.x = x,
                               .x_dtype = launch.out_dtype,
                               .x_stride = x_stride,
                               .k = launch.k,
                               .group = launch.k,
                               .scales = launch.x_scales,
                               .static_scales = true};
    quantize_ops(active_isa()).int8(request, static_cast<int8_t*>(const_cast<void*>(launch.x)), begin, end);
  }
  kernel->prepare(launch, begin, end);
}

Decoder::Decoder(const DecoderConfig& config, const DecoderModel& model)
    : config_(config), model_(model), ops_(&decoder_ops(active_isa())), head_padded_(padded(config.head_dim)) {
  check();
  config_.threads = std::clamp(config.threads, 1, kMostThreads);
  element_ = config.dtype == Dtype::kF32 ? 4 : 2;
  cache_element_ = config.cache_dtype == Dtype::kF32 ? 4 : has_scales(config.cache_dtype) ? 1 : 2;
  const int64_t length = ceil_div(config.max_length, kKeyBlock) * kKeyBlock;
  const size_t head_rows = model.layers.size() * static_cast<size_t>(config.sequences * config.kv_heads * length);
  keys_ = Memory(head_rows * static_cast<size_t>(config.head_dim) * cache_element_);
  values_ = Memory(head_rows * static_cast<size_t>(head_padded_) * cache_element_);
  if (has_scales(config.cache_dtype)) {
    key_scales_ = Memory(head_rows * key_groups() * sizeof(float));
    value_scales_ = Memory(head_rows * sizeof(float));
  }

  copy_constants();
  make_int8_tables();
  bind(&one_, 1);
  for (const Projection& p : one_.layers) {
    for (const Projection::Part& part : p.parts) weights_ += part.launch.n * part.launch.k;
  }
  allocate_threads();
}

void Decoder::check() const {
  const DecoderConfig& c = config_;
  const auto want = [](const std::string& name, int64_t got, int64_t expected) {
    if (got == expected) return;
    throw std::invalid_argument(name + " must be " + std::to_string(expected) + ", got " + std::to_string(got));
  };
  want("head_dim % 2", c.head_dim % 2, 0);
  want("heads % kv_heads", c.heads % c.kv_heads, 0);
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  // Each of several rows, or one of their sum.
  const auto want_linears = [&](const std::string& name, const std::vector<DecoderLinear>& linears, int64_t k,
                                const std::vector<int64_t>& rows) {
    const bool fused = linears.size() == 1;
    if (!fused) want("weights of " + name, static_cast<int64_t>(linears.size()), static_cast<int64_t>(rows.size()));
    for (size_t i = 0; i < linears.size(); ++i) {
      int64_t n = rows[i];
      for (size_t j = 1; fused && j < rows.size(); ++j) n += rows[j];
      want("rows of " + name, linears[i].launch.n, n);
      want("columns of " + name, linears[i].launch.k, k);
    }
  };
  want_linears("embedding", {model_.embedding}, c.hidden, {c.vocab});
  want_linears("head", {model_.head}, c.hidden, {c.vocab});
  for (const DecoderRope& rope : model_.ropes) {
    if (rope.dim < 0 || rope.dim > c.head_dim || rope.dim % 2) {
      throw std::invalid_argument("a rope's dim must be even and in [0, " + std::to_string(c.head_dim) + "], got " +
                                  std::to_string(rope.dim));
    }
  }
  if (model_.layers.empty()) throw std::invalid_argument("layers must not be empty");
  for (const DecoderLayer& layer : model_.layers) {
    want_linears("qkv", layer.qkv, c.hidden, {q, kv, kv});
    want_linears("o", {layer.o}, q, {c.hidden});
    want_linears("gate_up", layer.gate_up, c.hidden, {c.intermediate, c.intermediate});
    want_linears("down", {layer.down}, c.intermediate, {c.hidden});
    // Tasks are blocks of columns.
    if (layer.gate_up.size() == 1) want("intermediate % 64 of one weight for gate and up", c.intermediate % kBlockN, 0);
    if (layer.rope < -1 || layer.rope >= static_cast<int64_t>(model_.ropes.size())) {
      throw std::invalid_argument("rope must be -1 or the index of a rope, got " + std::to_string(layer.rope));
    }
    if (layer.window < 0)
      throw std::invalid_argument("window must not be negative, got " + std::to_string(layer.window));
  }
}

void Decoder::copy_constants() {
  const DecoderConfig& c = config_;
  constants_ = lay_out([&](Pieces& p) {
    const auto copy_norm = [&](const float** norm, int64_t n) {
      if (!*norm) return;
      float* to = p.floats(padded(n));
      if (!p.memory()) return;
      std::memcpy(to, *norm, static_cast<size_t>(n) * sizeof(float));
      *norm = to;
    };
    for (DecoderLayer& layer : model_.layers) {
      for (const float** norm : {&layer.input_norm, &layer.mlp_norm, &layer.attention_out_norm, &layer.out_norm}) {
        copy_norm(norm, c.hidden);
      }
      copy_norm(&layer.q_norm, c.head_dim);
      copy_norm(&layer.k_norm, c.head_dim);
      copy_norm(&layer.key_balance, c.kv_heads * c.head_dim);
    }
    copy_norm(&model_.norm, c.hidden);
    for (DecoderRope& rope : model_.ropes) {
      const int64_t width = padded(rope.dim);
      const auto copy_angles = [&](const float** angles, float beyond) {
        float* to = p.floats(c.max_length * width);
        if (!p.memory()) return;
        for (int64_t i = 0; i < c.max_length; ++i) {
          std::fill_n(to + i * width, width, beyond);
          std::copy_n(*angles + i * rope.dim, rope.dim, to + i * width);
        }
        *angles = to;
      };
      copy_angles(&rope.cos, 1.0f);
      copy_angles(&rope.sin, 0.0f);
    }
  });
}

void Decoder::make_int8_tables() {
  std::vector<DecoderLinear*> linears{&model_.head};
  for (DecoderLayer& layer : model_.layers) {
    for (std::vector<DecoderLinear>* group : {&layer.qkv, &layer.gate_up}) {
      for (DecoderLinear& linear : *group) linears.push_back(&linear);
    }
    linears.push_back(&layer.o);
    linears.push_back(&layer.down);
  }
  tables_ = Memory(linears.size() * kMaxEntries);
  int8_t* memory = reinterpret_cast<int8_t*>(tables_.data());
  for (DecoderLinear* linear : linears) {
    if (linear->dense || linear->request.x != Dtype::kI8) continue;
    set_int8_table(linear->request.codec, linear->request.bits, memory, &linear->launch);
    memory += kMaxEntries;
  }
}

Projection Decoder::project(const std::vector<DecoderLinear>& linears, const std::vector<char*>& outs,
                            int64_t out_stride, const char* x, int64_t x_stride, int64_t rows) const {
  Projection made;
  for (size_t i = 0; i < linears.size(); ++i) {
    const DecoderLinear& linear = linears[i];
    Projection::Part part{.kernel = nullptr,
                          .launch = linear.launch,
                          .dense = linear.dense,
                          .x = x,
                          .x_stride = x_stride,
                          .x_scale = linear.x_scale,
                          .tasks = 0,
                          .prepared_by = static_cast<int>(i),
                          .prepared_offset = made.prepared_bytes};
    Launch& l = part.launch;
    l.m = rows;
    l.out_dtype = config_.dtype;
    l.out = outs[i];
    l.out_stride = out_stride;
    if (linear.dense) {
      part.tasks = num_blocks(l.n);
      made.parts.push_back(part);
      continue;
    }
    Request request = linear.request;
    request.op = Op::kLinear;
    if (request.x != Dtype::kI8) request.x = config_.dtype;
    request.m = rows;
    request.threads = config_.threads;
    part.kernel = select(request, active_isa());
    if (!part.kernel || !part.kernel->prepare) throw std::invalid_argument("no kernel of this CPU serves this weight");
    const int64_t per_task = part.kernel->rows_per_task;
    part.tasks = num_blocks(l.n) * (per_task ? ceil_div(rows, per_task) : 1);
    part.place(nullptr);
    for (size_t j = 0; j < i; ++j) {
      const Projection::Part& other = made.parts[j];
      if (!other.kernel || other.x_scale != part.x_scale) continue;
      if (!prepares_alike(*other.kernel, other.launch, *part.kernel, l)) continue;
      part.prepared_by = other.prepared_by;
      part.prepared_offset = other.prepared_offset;
      break;
    }
    if (part.prepared_by == static_cast<int>(i)) made.prepared_bytes += part.bytes();
    made.parts.push_back(part);
  }
  return made;
}

void Decoder::bind(Bound* bound, int64_t rows) {
  if (bound->rows == rows) return;
  const DecoderConfig& c = config_;
  const int64_t qkv_width = (c.heads + 2 * c.kv_heads) * c.head_dim;
  bound->rows = rows;
  // One weight for both writes up behind gate.
  const bool fused = std::any_of(model_.layers.begin(), model_.layers.end(),
                                 [](const DecoderLayer& layer) { return layer.gate_up.size() == 1; });
  bound->gate_stride = fused ? 2 * c.intermediate : padded(c.intermediate);
  bound->activations = lay_out([&](Pieces& p) {
    const auto take = [&](int64_t width) { return p.take(static_cast<size_t>(rows * padded(width)) * element_); };
    bound->residual = take(c.hidden);
    bound->normed = take(c.hidden);
    bound->qkv = take(qkv_width);
    bound->attended = take(c.heads * c.head_dim);
    bound->y = take(c.hidden);
    bound->gate = take(bound->gate_stride);
    if (!fused) bound->up = take(c.intermediate);
  });
  if (fused) bound->up = bound->gate + static_cast<size_t>(c.intermediate) * element_;
  const int64_t hidden = padded(c.hidden), qkv = padded(qkv_width), inner = bound->gate_stride;
  char* k = bound->qkv + static_cast<size_t>(c.heads * c.head_dim) * element_;
  char* v = k + static_cast<size_t>(c.kv_heads * c.head_dim) * element_;
  bound->layers.clear();
  size_t bytes = 0;
  for (const DecoderLayer& layer : model_.layers) {
    bound->layers.push_back(project(layer.qkv, {bound->qkv, k, v}, qkv, bound->normed, hidden, rows));
    bound->layers.push_back(
        project({layer.o}, {bound->y}, hidden, bound->attended, padded(c.heads * c.head_dim), rows));
    bound->layers.push_back(project(layer.gate_up, {bound->gate, bound->up}, inner, bound->normed, hidden, rows));
    bound->layers.push_back(project({layer.down}, {bound->y}, hidden, bound->gate, inner, rows));
  }
  bound->head = project({model_.head}, {logits(0)}, c.vocab, bound->normed, hidden, rows);
  for (const Projection& p : bound->layers) bytes = std::max(bytes, p.prepared_bytes);
  bytes = std::max(bytes, bound->head.prepared_bytes);
  if (bound == &one_) return;  // prepared by every thread for itself
  bound->prepared = Memory(bytes);
  const auto place = [&](Projection& p) {
    for (Projection::Part& part : p.parts) {
      if (part.kernel) part.place(bound->prepared.data() + part.prepared_offset);
    }
  };
  for (Projection& p : bound->layers) place(p);
  place(bound->head);
}

void Decoder::allocate_threads() {
  const DecoderConfig& c = config_;
  const int64_t queries = std::max(c.heads, kQueryRows * (c.heads / c.kv_heads));
  size_t prepared = one_.head.prepared_bytes;
  for (const Projection& p : one_.layers) prepared = std::max(prepared, p.prepared_bytes);
  threads_.resize(static_cast<size_t>(config_.threads));
  for (Private& t : threads_) {
    t.memory = lay_out([&](Pieces& p) {
      t.residual = p.take(static_cast<size_t>(padded(c.hidden)) * element_);
      t.normed = p.take(static_cast<size_t>(padded(c.hidden)) * element_);
      t.attended = p.take(static_cast<size_t>(padded(c.heads * c.head_dim)) * element_);
      t.prepared = p.take(prepared);
      t.q = p.floats(queries * head_padded_);
      t.scratch = p.floats(std::max<int64_t>(queries, 2) * head_padded_);
      t.acc = p.floats(queries * head_padded_);
      t.max = p.floats(queries);
      t.sum = p.floats(queries);
      t.key = p.floats(head_padded_);
    });
  }
}

size_t Decoder::key_groups() const {
  return static_cast<size_t>(ceil_div(config_.head_dim, key_group(config_.cache_dtype, config_.head_dim)));
}

HeadCache Decoder::cache(int64_t sequence, size_t layer, int64_t kv_head) const {
  const size_t length = static_cast<size_t>(ceil_div(config_.max_length, kKeyBlock) * kKeyBlock);
  const size_t heads = static_cast<size_t>(sequence) * model_.layers.size() + layer;
  const size_t row = (heads * static_cast<size_t>(config_.kv_heads) + static_cast<size_t>(kv_head)) * length;
  HeadCache c{};
  c.keys = keys_.data() + row * static_cast<size_t>(config_.head_dim) * cache_element_;
  c.values = values_.data() + row * static_cast<size_t>(head_padded_) * cache_element_;
  if (has_scales(config_.cache_dtype)) {
    c.key_scales = reinterpret_cast<float*>(key_scales_.data()) + row * key_groups();
    c.value_scales = reinterpret_cast<float*>(value_scales_.data()) + row;
  }
  c.length = static_cast<int64_t>(length);
  c.dtype = config_.cache_dtype;
  c.dim = config_.head_dim;
  c.padded_dim = head_padded_;
  return c;
}

char* Decoder::row(char* rows, int64_t i, int64_t width) const {
  return rows + static_cast<size_t>(i * padded(width)) * element_;
}

int Decoder::useful_threads(int64_t rows) const {
  const int64_t steps = static_cast<int64_t>(std::max<size_t>(one_.layers.size(), 1));
  const int64_t useful = weights_ * rows / steps / kDecoderProductsPerThread;
  return static_cast<int>(std::clamp<int64_t>(useful, 1, config_.threads));
}

char* Decoder::logits(int64_t row) const {
  return static_cast<char*>(model_.logits) + static_cast<size_t>(row * config_.vocab) * element_;
}

template <class Fn>
void Decoder::in_team(Bound* bound, const Fn& fn) {
  // Made by the first thread, which waits for no other before it begins.
  std::unique_ptr<Team> owner;
  std::atomic<Team*> team{nullptr};
  parallel_threads(useful_threads(bound->rows), [&](int64_t index, int64_t count) {
    if (index == 0) {
      owner = std::make_unique<Team>(static_cast<int>(count));
      team.store(owner.get(), std::memory_order_release);
      team.notify_all();
    } else {
      team.wait(nullptr, std::memory_order_acquire);
    }
    fn(Worker{*this, *bound, *team.load(std::memory_order_acquire), static_cast<int>(index)});
  });
}

void Decoder::run(const int64_t* ids, int64_t count, TokenPlace place, Stop* stop) {
  while (count > 0 && !stop->asked()) {
    const int64_t rows = std::min(count, kPromptRows);
    if (rows > 1) bind(&many_, rows);
    in_team(rows > 1 ? &many_ : &one_, [&](Worker worker) { worker.run(ids, rows, place, rows == count); });
    ids += rows;
    place.position += rows;
    count -= rows;
  }
}

void Decoder::step(const int64_t* ids, const TokenPlace* places, int64_t count) {
  std::vector<bool> taken(static_cast<size_t>(config_.sequences));
  for (int64_t i = 0; i < count; ++i) {
    const auto [sequence, position] = places[i];
    if (sequence < 0 || sequence >= config_.sequences || position < 0 || position >= config_.max_length) {
      throw std::invalid_argument("a place must lie in the cache, got sequence " + std::to_string(sequence) +
                                  ", position " + std::to_string(position));
    }
    if (taken[static_cast<size_t>(sequence)]) {
      throw std::invalid_argument("a sequence must take one token, got " + std::to_string(sequence) + " again");
    }
    taken[static_cast<size_t>(sequence)] = true;
  }
  if (count == 0) return;
  bind(&batch_, count);
  in_team(&batch_, [&](Worker worker) { worker.run_each(ids, places); });
}

int64_t Decoder::likeliest(int64_t row) const {
  const bool nan = any_nan(logits(row), config_.dtype, 0, config_.vocab);
  if (nan) throw std::domain_error("the logits are NaN: the model's weights or its arithmetic are broken");
  return ops_->argmax(config_.dtype, logits(row), config_.vocab);
}

}  // namespace lowbit
