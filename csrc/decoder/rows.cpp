// Steps of a Worker for many tokens, of one sequence or one of each of several: rows are shared out.
#include <algorithm>

#include "core/n16.h"
#include "decoder/worker.h"

namespace lowbit {
namespace {

constexpr int64_t kRowsPerPiece = 8;

}  // namespace

void Worker::run_each(const int64_t* ids, const TokenPlace* places) {
  const size_t layers = d.model_.layers.size();
  embed_all(ids);
  for (size_t layer = 0; layer < layers; ++layer) {
    input_rows(layer);
    attend_places(layer, places);
    finish_rows(layer);
  }
  head_rows();
}

void Worker::embed_all(const int64_t* ids) {
  const int64_t rows = many.rows;
  share(ceil_div(rows, kRowsPerPiece), [&](int64_t b, int64_t e) {
    const int64_t begin = b * kRowsPerPiece;
    embed_rows(ids, begin, std::min(e * kRowsPerPiece, rows), d.row(many.residual, begin, d.config_.hidden));
  });
  team.wait();
}

// fill(begin, end) writes rows of the input, which are then prepared.
template <class Fn>
void Worker::project_rows(const Projection& p, const Fn& fill) {
  const int64_t rows = many.rows;
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
  project_rows(many.layers[Decoder::kInputs * layer + Decoder::kQkv], [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      d.ops_->add_norm(between(d.row(many.residual, i, hidden), layer ? d.row(many.y, i, hidden) : nullptr,
                               norm_before(layer), d.model_.layers[layer].input_norm, d.row(many.normed, i, hidden)));
    }
  });
}

void Worker::store_rows(size_t layer, TokenPlace place, int64_t rows) {
  const int64_t width = (d.config_.heads + 2 * d.config_.kv_heads) * d.config_.head_dim;
  share(ceil_div(rows, kRowsPerPiece), [&](int64_t b, int64_t e) {
    for (int64_t i = b * kRowsPerPiece; i < std::min(e * kRowsPerPiece, rows); ++i) {
      for (int64_t h = 0; h < d.config_.kv_heads; ++h) {
        store_key(layer, h, d.row(many.qkv, i, width), {place.sequence, place.position + i}, i + 1 == rows);
      }
    }
  });
  team.wait();
}

void Worker::attend_head(size_t layer, int64_t kv_head, int64_t first, int64_t rows, TokenPlace place) const {
  const DecoderConfig& c = d.config_;
  const int64_t group = c.heads / c.kv_heads, width = (c.heads + 2 * c.kv_heads) * c.head_dim;
  const int64_t window = d.model_.layers[layer].window;
  Decoder::Private& my = mine();
  for (int64_t r = 0; r < rows * group; ++r) {
    const int64_t i = r / group, head = kv_head * group + r % group;
    ready(layer, d.row(many.qkv, first + i, width), head, place.position + i, my.q + r * d.head_padded_);
  }
  Attend a{};
  a.cache = d.cache(place.sequence, layer, kv_head);
  a.q = my.q;
  a.q_dtype = c.dtype;
  a.rows = rows * group;
  a.group = group;
  a.first_limit = place.position + 1;
  a.end = place.position + rows;
  a.window = window ? window : a.end;
  a.begin = Seen(window, place.position).first * kKeyBlock;
  a.scale = c.score_scale;
  a.cap = c.score_cap;
  a.scratch = my.scratch;
  a.acc = my.acc;
  a.max = my.max;
  a.sum = my.sum;
  d.ops_->attend(a);
  for (int64_t r = 0; r < rows * group; ++r) {
    const Partial part{my.acc + r * d.head_padded_, my.max[r], my.sum[r]};
    char* out = d.row(many.attended, first + r / group, c.heads * c.head_dim);
    const size_t at = static_cast<size_t>((kv_head * group + r % group) * c.head_dim) * d.element_;
    d.ops_->finish(&part, 1, c.head_dim, c.dtype, out + at);
  }
}

void Worker::attend_rows(size_t layer, TokenPlace place) {
  const int64_t heads = d.config_.kv_heads, total = many.rows;
  share(ceil_div(total, kQueryRows) * heads, [&](int64_t b, int64_t e) {
    for (int64_t task = b; task < e; ++task) {
      const int64_t first = task / heads * kQueryRows;
      attend_head(layer, task % heads, first, std::min(kQueryRows, total - first),
                  {place.sequence, place.position + first});
    }
  });
  team.wait();
}

void Worker::attend_places(size_t layer, const TokenPlace* places) {
  const DecoderConfig& c = d.config_;
  const int64_t width = (c.heads + 2 * c.kv_heads) * c.head_dim;
  share(many.rows * c.kv_heads, [&](int64_t b, int64_t e) {
    for (int64_t task = b; task < e; ++task) {
      const int64_t i = task / c.kv_heads, h = task % c.kv_heads;
      store_key(layer, h, d.row(many.qkv, i, width), places[i], true);
      attend_head(layer, h, i, 1, places[i]);
    }
  });
  team.wait();
}

void Worker::head_rows() {
  const DecoderConfig& c = d.config_;
  const auto normed = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      d.ops_->add_norm(between(d.row(many.residual, i, c.hidden), d.row(many.y, i, c.hidden),
                               norm_before(d.model_.layers.size()), d.model_.norm, d.row(many.normed, i, c.hidden)));
    }
  };
  const Projection::Part& part = many.head.parts[0];
  if (part.dense) {
    share(ceil_div(many.rows, kRowsPerPiece),
          [&](int64_t b, int64_t e) { normed(b * kRowsPerPiece, std::min(e * kRowsPerPiece, many.rows)); });
    team.wait();
    share(part.tasks * many.rows, [&](int64_t b, int64_t e) {
      for (int64_t task = b; task < e; ++task) {
        const int64_t i = task / part.tasks, begin = task % part.tasks * kBlockN;
        d.ops_->dense(c.dtype, part.dense, part.launch.bias, d.row(many.normed, i, c.hidden), c.hidden, begin,
                      std::min(begin + kBlockN, c.vocab), d.logits(i));
      }
    });
    team.wait();
  } else {
    project_rows(many.head, normed);
  }
  if (c.logit_divisor == 1.0f && c.logit_cap == 0.0f) return;
  share(many.rows, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      d.ops_->cap_logits(c.dtype, d.logits(i), c.logit_divisor, c.logit_cap, 0, c.vocab);
    }
  });
  team.wait();
}

void Worker::finish_rows(size_t layer) {
  const Projection* p = &many.layers[Decoder::kInputs * layer];
  const DecoderConfig& c = d.config_;
  project_rows(p[Decoder::kOut], [](int64_t, int64_t) {});
  project_rows(p[Decoder::kGateUp], [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      d.ops_->add_norm(between(d.row(many.residual, i, c.hidden), d.row(many.y, i, c.hidden),
                               d.model_.layers[layer].attention_out_norm, d.model_.layers[layer].mlp_norm,
                               d.row(many.normed, i, c.hidden)));
    }
  });
  project_rows(p[Decoder::kDown], [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const size_t at = static_cast<size_t>(i * many.gate_stride) * d.element_;
      d.ops_->gate_mul(c.activation, c.dtype, many.gate + at, many.up + at, c.intermediate);
    }
  });
}

}  // namespace lowbit
