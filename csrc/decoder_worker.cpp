#include "decoder_worker.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "layout.h"

namespace lowbit {
namespace {

constexpr int64_t kRowsPerPiece = 8;

// Runs the tasks [begin, end) of all parts, which stand one after the other.
void run_parts(const Projection::Part* parts, size_t count, int64_t begin, int64_t end) {
  for (size_t i = 0; i < count; ++i) {
    const Projection::Part& part = parts[i];
    const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, part.tasks);
    if (first < last) run_tasks(*part.kernel, part.launch, first, last);
    begin -= part.tasks;
    end -= part.tasks;
  }
}

}  // namespace

void Worker::run(const int64_t* ids, int64_t rows, int64_t position, bool logits) {
  const size_t layers = d.model_.layers.size();
  Decoder::Private& my = mine();
  if (rows == 1) {
    embed_rows(ids, 0, 1, my.residual);
    for (size_t layer = 0; layer < layers; ++layer) {
      add_norm(layer ? d.one_.y : nullptr, d.model_.layers[layer].input_norm);
      project(d.one_.layers[Decoder::kInputs * layer + Decoder::kQkv], my.normed);
      finish_layer(layer, d.one_.qkv, position);
    }
  } else {
    share(ceil_div(rows, kRowsPerPiece), [&](int64_t b, int64_t e) {
      const int64_t begin = b * kRowsPerPiece;
      embed_rows(ids, begin, std::min(e * kRowsPerPiece, rows), d.row(d.many_.residual, begin, d.config_.hidden));
    });
    team.wait();
    for (size_t layer = 0; layer + 1 < layers; ++layer) {
      input_rows(layer);
      store_rows(layer, position, rows);
      attend_rows(layer, position);
      finish_rows(layer);
    }
    // Of the last layer, only the last token's result is read.
    const size_t layer = layers - 1;
    input_rows(layer);
    const int64_t last = rows - 1;
    store_rows(layer, position, logits ? last : rows);
    if (!logits) return;
    std::memcpy(my.residual, d.row(d.many_.residual, last, d.config_.hidden),
                static_cast<size_t>(d.config_.hidden) * d.element_);
    const int64_t width = (d.config_.heads + 2 * d.config_.kv_heads) * d.config_.head_dim;
    finish_layer(layer, d.row(d.many_.qkv, last, width), position + last);
  }
  if (!logits) return;
  add_norm(d.one_.y, d.model_.norm);
  project(d.head_, my.normed);
}

void Worker::embed_rows(const int64_t* ids, int64_t begin, int64_t end, char* out) const {
  const DecoderLinear& e = d.model_.embedding;
  if (e.dense) {
    const size_t bytes = static_cast<size_t>(d.config_.hidden) * d.element_;
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(d.row(out, i - begin, d.config_.hidden),
                  static_cast<const char*>(e.dense) + static_cast<size_t>(ids[i]) * bytes, bytes);
    }
    return;
  }
  Launch l = e.launch;
  l.out = out;
  l.out_dtype = d.config_.dtype;
  l.out_stride = ceil_div(d.config_.hidden, kRowAlign) * kRowAlign;
  embed(l, e.desc.bits, e.desc.scope, ids + begin, end - begin, 1);
}

void Worker::add_norm(const char* y, const void* weight) const {
  d.ops_->add_norm(d.config_.dtype, mine().residual, y, weight, d.config_.eps, d.config_.hidden, mine().normed);
}

void Worker::prepare_one(Projection::Part* part, size_t i, const char* x) const {
  part->x = x;
  part->place(mine().prepared + part->prepared_offset);
  if (part->prepared_by == static_cast<int>(i)) part->prepare(0, 1);
}

void Worker::project(const Projection& p, const char* x) {
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
    });
  } else {
    share(tasks, [&](int64_t b, int64_t e) { run_parts(parts, count, b, e); });
  }
  team.wait();
}

void Worker::gate_up(const Projection& p, const char* x) {
  Projection::Part parts[2];
  for (size_t i = 0; i < 2; ++i) {
    parts[i] = p.parts[i];
    prepare_one(&parts[i], i, x);
  }
  share(num_blocks(d.config_.intermediate), [&](int64_t b, int64_t e) {
    for (const Projection::Part& part : parts) run_tasks(*part.kernel, part.launch, b, e);
    const size_t offset = static_cast<size_t>(b * kBlockN) * d.element_;
    const int64_t count = std::min(e * kBlockN, d.config_.intermediate) - b * kBlockN;
    d.ops_->silu_mul(d.config_.dtype, d.one_.gate + offset, d.one_.up + offset, count);
  });
  team.wait();
}

void Worker::rotate_query(const char* qkv, int64_t head, int64_t position, float* out) const {
  const size_t at = static_cast<size_t>(head * d.config_.head_dim) * d.element_;
  const int64_t angle = position * d.head_padded_;
  d.ops_->rotate(d.config_.dtype, qkv + at, d.cos_ + angle, d.sin_ + angle, d.config_.head_dim, mine().scratch, out);
}

void Worker::store_key(size_t layer, int64_t kv_head, const char* qkv, int64_t position, bool last) const {
  const int64_t heads = d.config_.heads, value = heads + d.config_.kv_heads + kv_head;
  rotate_query(qkv, heads + kv_head, position, mine().key);
  const char* v = qkv + static_cast<size_t>(value * d.config_.head_dim) * d.element_;
  d.ops_->store_position(d.cache(layer, kv_head), position, last, mine().key, d.config_.dtype, v, mine().scratch);
}

namespace {

// The units of one key head and kKeyBlock positions that a thread takes, head by head.
struct Range {
  int64_t begin, end;
  Range(int index, int threads, int64_t units) : begin(units * index / threads), end(units * (index + 1) / threads) {}
};

}  // namespace

void Worker::attend_one(size_t layer, const char* qkv, int64_t position) {
  const int64_t blocks = ceil_div(position + 1, kKeyBlock), group = d.config_.heads / d.config_.kv_heads;
  const Range range(index, team.threads(), blocks * d.config_.kv_heads);
  Decoder::Private& my = mine();
  for (int64_t h = range.begin / blocks; h * blocks < range.end; ++h) {
    const int64_t begin = std::max(range.begin - h * blocks, int64_t{0}),
                  end = std::min(range.end - h * blocks, blocks);
    if (end == blocks) store_key(layer, h, qkv, position, true);
    for (int64_t i = 0; i < group; ++i) rotate_query(qkv, h * group + i, position, my.q + i * d.head_padded_);
    Attend a{};
    a.cache = d.cache(layer, h);
    a.q = my.q;
    a.rows = a.group = group;
    a.first_limit = position + 1;
    a.begin = begin * kKeyBlock;
    a.end = std::min(end * kKeyBlock, position + 1);
    a.scale = d.config_.scale;
    a.scratch = my.scratch;
    a.acc = my.acc + h * group * d.head_padded_;
    a.max = my.max + h * group;
    a.sum = my.sum + h * group;
    d.ops_->attend(a);
  }
  team.wait();
}

void Worker::merge(int64_t position) const {
  const int64_t blocks = ceil_div(position + 1, kKeyBlock), group = d.config_.heads / d.config_.kv_heads;
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

void Worker::finish_layer(size_t layer, const char* qkv, int64_t position) {
  const Projection* p = &d.one_.layers[Decoder::kInputs * layer];
  attend_one(layer, qkv, position);
  merge(position);
  project(p[Decoder::kOut], mine().attended);
  add_norm(d.one_.y, d.model_.layers[layer].mlp_norm);
  gate_up(p[Decoder::kGateUp], mine().normed);
  project(p[Decoder::kDown], d.one_.gate);
}

// fill(begin, end) writes rows of the input, which are then prepared.
template <class Fn>
void Worker::project_rows(const Projection& p, const Fn& fill) {
  const int64_t rows = d.many_.rows;
  share(ceil_div(rows, kRowsPerPiece), [&](int64_t b, int64_t e) {
    const int64_t begin = b * kRowsPerPiece, end = std::min(e * kRowsPerPiece, rows);
    fill(begin, end);
    for (size_t i = 0; i < p.parts.size(); ++i) {
      const Projection::Part& part = p.parts[i];
      if (part.prepared_by == static_cast<int>(i)) part.prepare(begin, end);
    }
  });
  team.wait();
  int64_t tasks = 0;
  for (const Projection::Part& part : p.parts) tasks += part.tasks;
  share(tasks, [&](int64_t b, int64_t e) { run_parts(p.parts.data(), p.parts.size(), b, e); });
  team.wait();
}

void Worker::input_rows(size_t layer) {
  const int64_t hidden = d.config_.hidden;
  project_rows(d.many_.layers[Decoder::kInputs * layer + Decoder::kQkv], [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      d.ops_->add_norm(d.config_.dtype, d.row(d.many_.residual, i, hidden),
                       layer ? d.row(d.many_.y, i, hidden) : nullptr, d.model_.layers[layer].input_norm, d.config_.eps,
                       hidden, d.row(d.many_.normed, i, hidden));
    }
  });
}

void Worker::store_rows(size_t layer, int64_t position, int64_t rows) {
  const int64_t width = (d.config_.heads + 2 * d.config_.kv_heads) * d.config_.head_dim;
  share(ceil_div(rows, kRowsPerPiece), [&](int64_t b, int64_t e) {
    for (int64_t i = b * kRowsPerPiece; i < std::min(e * kRowsPerPiece, rows); ++i) {
      for (int64_t h = 0; h < d.config_.kv_heads; ++h) {
        store_key(layer, h, d.row(d.many_.qkv, i, width), position + i, i + 1 == rows);
      }
    }
  });
  team.wait();
}

void Worker::attend_rows(size_t layer, int64_t position) {
  const DecoderConfig& c = d.config_;
  const int64_t group = c.heads / c.kv_heads, width = (c.heads + 2 * c.kv_heads) * c.head_dim;
  const int64_t total = d.many_.rows;
  Decoder::Private& my = mine();
  share(ceil_div(total, kQueryRows) * c.kv_heads, [&](int64_t b, int64_t e) {
    for (int64_t task = b; task < e; ++task) {
      const int64_t first = task / c.kv_heads * kQueryRows, h = task % c.kv_heads;
      const int64_t rows = std::min(kQueryRows, total - first);
      for (int64_t r = 0; r < rows * group; ++r) {
        const int64_t i = first + r / group;
        rotate_query(d.row(d.many_.qkv, i, width), h * group + r % group, position + i, my.q + r * d.head_padded_);
      }
      Attend a{};
      a.cache = d.cache(layer, h);
      a.q = my.q;
      a.rows = rows * group;
      a.group = group;
      a.first_limit = position + first + 1;
      a.end = position + first + rows;
      a.scale = c.scale;
      a.scratch = my.scratch;
      a.acc = my.acc;
      a.max = my.max;
      a.sum = my.sum;
      d.ops_->attend(a);
      for (int64_t r = 0; r < rows * group; ++r) {
        const Partial part{my.acc + r * d.head_padded_, my.max[r], my.sum[r]};
        char* out = d.row(d.many_.attended, first + r / group, c.heads * c.head_dim);
        const size_t at = static_cast<size_t>((h * group + r % group) * c.head_dim) * d.element_;
        d.ops_->finish(&part, 1, c.head_dim, c.dtype, out + at);
      }
    }
  });
  team.wait();
}

void Worker::finish_rows(size_t layer) {
  const Projection* p = &d.many_.layers[Decoder::kInputs * layer];
  const DecoderConfig& c = d.config_;
  project_rows(p[Decoder::kOut], [](int64_t, int64_t) {});
  project_rows(p[Decoder::kGateUp], [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      d.ops_->add_norm(c.dtype, d.row(d.many_.residual, i, c.hidden), d.row(d.many_.y, i, c.hidden),
                       d.model_.layers[layer].mlp_norm, c.eps, c.hidden, d.row(d.many_.normed, i, c.hidden));
    }
  });
  project_rows(p[Decoder::kDown], [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      d.ops_->silu_mul(c.dtype, d.row(d.many_.gate, i, c.intermediate), d.row(d.many_.up, i, c.intermediate),
                       c.intermediate);
    }
  });
}

}  // namespace lowbit
