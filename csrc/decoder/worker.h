// One thread of a Decoder's team; only the decoder's own files include it. worker.cpp has what it does for one
// token, rows.cpp for many.
#pragma once

#include <algorithm>

#include "core/dispatch.h"
#include "core/n16.h"
#include "decoder/decoder.h"
#include "decoder/team.h"

namespace lowbit {

constexpr int64_t kPromptRows = 512;  // tokens of a prompt that go through the layers together
constexpr int kMostThreads = 256;
constexpr int64_t kQueryRows = 16;  // tokens whose queries share a pass over the cache

// Runs the tasks [begin, end) of all parts, which stand one after the other.
inline void run_parts(const Projection::Part* parts, size_t count, int64_t begin, int64_t end) {
  for (size_t i = 0; i < count; ++i) {
    const Projection::Part& part = parts[i];
    const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, part.tasks);
    if (first < last) run_tasks(*part.kernel, part.launch, first, last);
    begin -= part.tasks;
    end -= part.tasks;
  }
}

// The blocks of kKeyBlock positions that a token of a layer sees.
struct Seen {
  int64_t first, blocks;
  Seen(int64_t window, int64_t position)
      : first(window ? std::max<int64_t>(position + 1 - window, 0) / kKeyBlock : 0),
        blocks(ceil_div(position + 1, kKeyBlock) - first) {}
};

struct Worker {
  Decoder& d;
  Decoder::Bound& many;  // of the rows of this call, unless it is one
  Team& team;
  int index;
  uint16_t step = 0;

  // What all threads do for `rows` tokens of one sequence; the logits only if they are asked for.
  void run(const int64_t* ids, int64_t rows, TokenPlace place, bool logits);
  // For a token of each of several sequences.
  void run_each(const int64_t* ids, const TokenPlace* places);

 private:
  template <class Fn>
  void share(int64_t tasks, const Fn& fn) {
    team.share(++step, index, tasks, fn);
  }
  Decoder::Private& mine() const { return d.threads_[static_cast<size_t>(index)]; }

  void embed_rows(const int64_t* ids, int64_t begin, int64_t end, char* out) const;

  // One token: every thread holds the residual and prepares the inputs for itself.
  // Part i of a projection, on the memory of this thread.
  void prepare_one(Projection::Part* part, size_t i, const char* x) const;
  // Each range of blocks of 64 results that a thread has made is handed to finish(begin, end).
  template <class Fn>
  void project(const Projection& p, const char* x, const Fn& finish);
  void project(const Projection& p, const char* x);
  void head();
  void gate_up(const Projection& p, const char* x);
  // A head of the queries, then of the keys, with its norm and rotary embedding, balanced.
  void ready(size_t layer, const char* qkv, int64_t head, int64_t position, float* out) const;
  void store_key(size_t layer, int64_t kv_head, const char* qkv, TokenPlace place, bool last) const;
  void attend_one(size_t layer, const char* qkv, TokenPlace place);
  void merge(size_t layer, int64_t position) const;
  void finish_layer(size_t layer, const char* qkv, TokenPlace place);
  // x += y, through the norm y_norm unless it is null; the normed x.
  AddNorm between(char* x, const char* y, const float* y_norm, const float* weight, char* out) const;
  void add_norm(const char* y, const float* y_norm, const float* weight) const;

  // Many tokens: rows are shared out.
  template <class Fn>
  void project_rows(const Projection& p, const Fn& fill);
  // The weight of the norm of what the layer before this one adds.
  const float* norm_before(size_t layer) const { return layer ? d.model_.layers[layer - 1].out_norm : nullptr; }
  void input_rows(size_t layer);
  void store_rows(size_t layer, TokenPlace place, int64_t rows);
  // `rows` successive tokens of a sequence, in the rows from `first` on, with one key head.
  void attend_head(size_t layer, int64_t kv_head, int64_t first, int64_t rows, TokenPlace place) const;
  void attend_rows(size_t layer, TokenPlace place);
  void attend_places(size_t layer, const TokenPlace* places);
  void embed_all(const int64_t* ids);
  void head_rows();
  void finish_rows(size_t layer);
};

}  // namespace lowbit
