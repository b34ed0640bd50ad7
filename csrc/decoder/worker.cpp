#include "decoder/worker.h"

#include <algorithm>
#include <cstring>

#include "core/dispatch.h"
#include "core/n16.h"

namespace lowbit {

void Worker::run(const int64_t* ids, int64_t rows, TokenPlace place, bool logits) {
  const size_t layers = d.model_.layers.size();
  Decoder::Private& my = mine();
  if (rows == 1) {
    embed_rows(ids, 0, 1, my.residual);
    for (size_t layer = 0; layer < layers; ++layer) {
      add_norm(layer ? d.one_.y : nullptr, norm_before(layer), d.model_.layers[layer].input_norm);
      project(d.one_.layers[Decoder::kInputs * layer + Decoder::kQkv], my.normed);
      finish_layer(layer, d.one_.qkv, place);
    }
  } else {
    embed_all(ids);
    for (size_t layer = 0; layer + 1 < layers; ++layer) {
      input_rows(layer);
      store_rows(layer, place, rows);
      attend_rows(layer, place);
      finish_rows(layer);
    }
    // Of the last layer, only the last token's result is read.
    const size_t layer = layers - 1;
    input_rows(layer);
    const int64_t last = rows - 1;
    store_rows(layer, place, logits ? last : rows);
    if (!logits) return;
    std::memcpy(my.residual, d.row(many.residual, last, d.config_.hidden),
                static_cast<size_t>(d.config_.hidden) * d.element_);
    const int64_t width = (d.config_.heads + 2 * d.config_.kv_heads) * d.config_.head_dim;
    finish_layer(layer, d.row(many.qkv, last, width), {place.sequence, place.position + last});
  }
  if (!logits) return;
  add_norm(d.one_.y, norm_before(layers), d.model_.norm);
  head();
}

void Worker::embed_rows(const int64_t* ids, int64_t begin, int64_t end, char* out) const {
  const DecoderLinear& e = d.model_.embedding;
  if (e.dense) {
    const size_t bytes = static_cast<size_t>(d.config_.hidden) * d.element_;
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(d.row(out, i - begin, d.config_.hidden),
                  static_cast<const char*>(e.dense) + static_cast<size_t>(ids[i]) * bytes, bytes);
    }
  } else {
    Launch l = e.launch;
    l.out = out;
    l.out_dtype = d.config_.dtype;
    l.out_stride = ceil_div(d.config_.hidden, kRowAlign) * kRowAlign;
    embed(l, e.request.bits, e.request.scope, ids + begin, end - begin, 1);
  }
  if (d.config_.embedding_scale == 1.0f) return;
  for (int64_t i = begin; i < end; ++i) {
    d.ops_->scale(d.config_.dtype, d.row(out, i - begin, d.config_.hidden), d.config_.embedding_scale,
                  d.config_.hidden);
  }
}

AddNorm Worker::between(char* x, const char* y, const float* y_norm, const float* weight, char* out) const {
  const DecoderConfig& c = d.config_;
  return {{c.dtype, c.eps, c.late_norms}, c.hidden, c.residual_scale, x, y, y_norm, weight, out};
}

void Worker::add_norm(const char* y, const float* y_norm, const float* weight) const {
  d.ops_->add_norm(between(mine().residual, y, y_norm, weight, mine().normed));
}

void Worker::prepare_one(Projection::Part* part, size_t i, const char* x) const {
  part->x = x;
  part->place(mine().prepared + part->prepared_offset);
  if (part->prepared_by == static_cast<int>(i)) part->prepare(0, 1);
}

template <class Fn>
void Worker::project(const Projection& p, const char* x, const Fn& finish) {
  constexpr size_t kMost = 3;
  Projection::Part parts[kMost];
  const size_t count = p.parts.size();
  int64_t tasks = 0;
  for (size_t i = 0; i < count; ++i) {
    parts[i] = p.parts[i];
    tasks += parts[i].tasks;
    if (parts[i].kernel) prepare_one(&parts[i], i, x);
  }
  if (p.parts[0].dense) {
    const Projection::Part& part = parts[0];
    share(tasks, [&](int64_t b, int64_t e) {
      const Launch& l = part.launch;
      d.ops_->dense(d.config_.dtype, part.dense, l.bias, x, l.k, b * kBlockN, std::min(e * kBlockN, l.n), l.out);
      finish(b, e);
    });
  } else {
    share(tasks, [&](int64_t b, int64_t e) {
      run_parts(parts, count, b, e);
      finish(b, e);
    });
  }
  team.wait();
}

void Worker::project(const Projection& p, const char* x) {
  project(p, x, [](int64_t, int64_t) {});
}

void Worker::head() {
  const DecoderConfig& c = d.config_;
  if (c.logit_divisor == 1.0f && c.logit_cap == 0.0f) return project(d.one_.head, mine().normed);
  project(d.one_.head, mine().normed, [&](int64_t b, int64_t e) {
    d.ops_->cap_logits(c.dtype, d.model_.logits, c.logit_divisor, c.logit_cap, b * kBlockN,
                       std::min(e * kBlockN, c.vocab));
  });
}

void Worker::gate_up(const Projection& p, const char* x) {
  Projection::Part parts[2];
  const size_t count = p.parts.size();
  for (size_t i = 0; i < count; ++i) {
    parts[i] = p.parts[i];
    prepare_one(&parts[i], i, x);
  }
  const int64_t blocks = num_blocks(d.config_.intermediate);
  share(blocks, [&](int64_t b, int64_t e) {
    for (size_t i = 0; i < count; ++i) run_tasks(*parts[i].kernel, parts[i].launch, b, e);
    if (count == 1) run_tasks(*parts[0].kernel, parts[0].launch, blocks + b, blocks + e);
    const size_t offset = static_cast<size_t>(b * kBlockN) * d.element_;
    const int64_t n = std::min(e * kBlockN, d.config_.intermediate) - b * kBlockN;
    d.ops_->gate_mul(d.config_.activation, d.config_.dtype, d.one_.gate + offset, d.one_.up + offset, n);
  });
  team.wait();
}

void Worker::ready(size_t layer, const char* qkv, int64_t head, int64_t position, float* out) const {
  const DecoderConfig& c = d.config_;
  const DecoderLayer& l = d.model_.layers[layer];
  Head h{};
  h.norm = {c.dtype, c.eps, c.late_norms};
  h.dim = c.head_dim;
  h.x = qkv + static_cast<size_t>(head * c.head_dim) * d.element_;
  h.weight = head < c.heads ? l.q_norm : l.k_norm;
  if (l.rope >= 0) {
    const DecoderRope& rope = d.model_.ropes[static_cast<size_t>(l.rope)];
    const int64_t angle = position * (ceil_div(rope.dim, kRowAlign) * kRowAlign);
    h.rotary = rope.dim;
    h.cos = rope.cos + angle;
    h.sin = rope.sin + angle;
  }
  h.scratch = mine().scratch;
  h.out = out;
  d.ops_->ready(h);
  if (!l.key_balance) return;
  const bool is_key = head >= c.heads;
  const int64_t kv_head = is_key ? head - c.heads : head / (c.heads / c.kv_heads);
  const float* balance = l.key_balance + kv_head * c.head_dim;
  for (int64_t i = 0; i < c.head_dim; ++i) out[i] = is_key ? out[i] / balance[i] : out[i] * balance[i];
}

void Worker::store_key(size_t layer, int64_t kv_head, const char* qkv, TokenPlace place, bool last) const {
  const int64_t heads = d.config_.heads, value = heads + d.config_.kv_heads + kv_head;
  ready(layer, qkv, heads + kv_head, place.position, mine().key);
  const char* v = qkv + static_cast<size_t>(value * d.config_.head_dim) * d.element_;
  d.ops_->store_position(d.cache(place.sequence, layer, kv_head), place.position, last, mine().key, d.config_.dtype, v,
                         mine().scratch);
}

namespace {

// The units of one key head and kKeyBlock positions that a thread takes, head by head.
struct Range {
  int64_t begin, end;
  Range(int index, int threads, int64_t units) : begin(units * index / threads), end(units * (index + 1) / threads) {}
};

}  // namespace

void Worker::attend_one(size_t layer, const char* qkv, TokenPlace place) {
  const DecoderConfig& c = d.config_;
  const int64_t position = place.position;
  const int64_t window = d.model_.layers[layer].window, group = c.heads / c.kv_heads;
  const Seen seen(window, position);
  const int64_t blocks = seen.blocks;
  const Range range(index, team.threads(), blocks * c.kv_heads);
  Decoder::Private& my = mine();
  for (int64_t h = range.begin / blocks; h * blocks < range.end; ++h) {
    const int64_t begin = std::max(range.begin - h * blocks, int64_t{0}),
                  end = std::min(range.end - h * blocks, blocks);
    if (end == blocks) store_key(layer, h, qkv, place, true);
    for (int64_t i = 0; i < group; ++i) ready(layer, qkv, h * group + i, position, my.q + i * d.head_padded_);
    Attend a{};
    a.cache = d.cache(place.sequence, layer, h);
    a.q = my.q;
    a.q_dtype = c.dtype;
    a.rows = a.group = group;
    a.first_limit = position + 1;
    a.window = window ? window : position + 1;
    a.begin = (seen.first + begin) * kKeyBlock;
    a.end = std::min((seen.first + end) * kKeyBlock, position + 1);
    a.scale = c.score_scale;
    a.cap = c.score_cap;
    a.scratch = my.scratch;
    a.acc = my.acc + h * group * d.head_padded_;
    a.max = my.max + h * group;
    a.sum = my.sum + h * group;
    d.ops_->attend(a);
  }
  team.wait();
}

void Worker::merge(size_t layer, int64_t position) const {
  const int64_t blocks = Seen(d.model_.layers[layer].window, position).blocks;
  const int64_t group = d.config_.heads / d.config_.kv_heads;
  Partial parts[kMostThreads];
  for (int64_t head = 0; head < d.config_.heads; ++head) {
    const int64_t first = head / group * blocks;
    int count = 0;
    for (int t = 0; t < team.threads(); ++t) {
      const Range range(t, team.threads(), blocks * d.config_.kv_heads);
      if (range.begin >= first + blocks || range.end <= first || range.begin == range.end) continue;
      const Decoder::Private& other = d.threads_[static_cast<size_t>(t)];
      parts[count++] = {other.acc + head * d.head_padded_, other.max[head], other.sum[head]};
    }
    char* out = mine().attended + static_cast<size_t>(head * d.config_.head_dim) * d.element_;
    d.ops_->finish(parts, count, d.config_.head_dim, d.config_.dtype, out);
  }
}

void Worker::finish_layer(size_t layer, const char* qkv, TokenPlace place) {
  const Projection* p = &d.one_.layers[Decoder::kInputs * layer];
  attend_one(layer, qkv, place);
  merge(layer, place.position);
  project(p[Decoder::kOut], mine().attended);
  add_norm(d.one_.y, d.model_.layers[layer].attention_out_norm, d.model_.layers[layer].mlp_norm);
  gate_up(p[Decoder::kGateUp], mine().normed);
  project(p[Decoder::kDown], d.one_.gate);
}

}  // namespace lowbit
