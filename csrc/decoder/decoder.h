// A decoder over packed weights, from a description of it: embedding, layers of attention and a gated MLP, final norm
// and head, with a static cache of keys and values for a number of sequences. All threads run all steps in one parallel
// region per call, with buffers that never move.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/kernel.h"
#include "core/stop.h"
#include "decoder/ops.h"

namespace lowbit {

class Team;

struct DecoderConfig {
  Dtype dtype;        // of the activations, the embedding's rows and dense weights
  Dtype cache_dtype;  // kF32, kBf16, kF16, kI8 or kE4m3: of keys and values
  int64_t hidden, heads, kv_heads, head_dim, intermediate, vocab, max_length;
  float eps;        // of the norms
  bool late_norms;  // rounded once, behind the weight
  Activation activation;
  float score_scale, score_cap;  // scores: score_cap tanh(score_scale q k / score_cap); a cap of 0 is none
  float embedding_scale, residual_scale;
  float logit_divisor, logit_cap;
  int64_t sequences;  // that the cache has room for
  int threads;
};

// y = x W^T + bias. `launch` and `request` hold the packed weight and the bias; x, out and m are set by the decoder. A
// weight that is `dense`, (n, k), serves for the embedding and the head. request.x is kI8 if x is to be quantized: by
// x_scale, or, if that is 0, by absmax / 127 of each row or of its blocks of launch.x_group.
struct DecoderLinear {
  Launch launch;
  Request request;
  const void* dense = nullptr;
  float x_scale = 0;
};

// x += attention(norm(x)); x += mlp(norm(x)). The norms are what normed values are multiplied by.
struct DecoderLayer {
  const float *input_norm, *mlp_norm;          // (hidden)
  const float *attention_out_norm, *out_norm;  // (hidden), of what attention and the MLP add, or null
  const float *q_norm, *k_norm;                // (head_dim), of each head, or null
  // (kv_heads, head_dim) powers of two that keys are divided by before they are stored, and queries multiplied by, or
  // null: they bring the dimensions of a key nearer to each other before these are rounded.
  const float* key_balance;
  int rope;                                 // which of the model's, or -1: none
  int64_t window;                           // positions that a token sees, the last being its own; 0: all
  std::vector<DecoderLinear> qkv, gate_up;  // q, k, v, or one with the rows of all; gate and up likewise
  DecoderLinear o, down;
};

// Rotary embedding of the first `dim` dimensions of a head. cos, sin: (max_length, dim), in the values of the
// activations' dtype; the first half of sin is negated.
struct DecoderRope {
  int64_t dim;
  const float *cos, *sin;
};

struct DecoderModel {
  DecoderLinear embedding, head;
  std::vector<DecoderLayer> layers;
  std::vector<DecoderRope> ropes;
  const float* norm;  // (hidden)
  void* logits;       // (sequences, vocab): where they go
};

// A position of a sequence of the cache.
struct TokenPlace {
  int64_t sequence, position;
};

// Zeroed memory, aligned to 64 bytes; large pieces take no memory until they are written.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);
  char* data() const { return aligned_; }

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> owner_;
  char* aligned_ = nullptr;
};

// Linears with the same input, bound to their kernels and buffers for some number of rows.
struct Projection {
  struct Part {
    const Kernel* kernel;  // null for a dense weight
    Launch launch;         // its x is what the kernel prepares
    const void* dense;
    const void* x;  // rows of the dtype of the results, x_stride elements apart
    int64_t x_stride;
    float x_scale;
    int64_t tasks;
    int prepared_by;  // the part, at or before this one, whose prepared input this one reads
    size_t prepared_offset;

    // The bytes where x is prepared, where they are, and the preparation of rows [begin, end).
    size_t bytes() const;
    void place(char* prepared);
    void prepare(int64_t begin, int64_t end) const;
  };
  std::vector<Part> parts;
  size_t prepared_bytes = 0;
};

// The functions of the newest instruction set in a mask.
const DecoderOps& decoder_ops(uint32_t isa_mask);

class Decoder {
 public:
  // Copies the norms, balances, cos and sin; the other memory must outlive the decoder. Throws std::invalid_argument if
  // sizes contradict each other or no kernel of this CPU serves a weight.
  Decoder(const DecoderConfig& config, const DecoderModel& model);

  // Appends `count` tokens, each in [0, vocab), to a sequence: the cache holds what was appended at the positions
  // below. Writes the logits after the last token to the first row, unless it is stopped.
  void run(const int64_t* ids, int64_t count, TokenPlace place, Stop* stop);

  // Appends a token to each of `count` different sequences. Writes the logits after token i to row i.
  void step(const int64_t* ids, const TokenPlace* places, int64_t count);

  // The token of the largest logit of a row, the first of several. Throws std::domain_error if a logit is NaN.
  int64_t likeliest(int64_t row) const;

 private:
  friend struct Worker;
  enum Input { kQkv, kOut, kGateUp, kDown, kInputs };

  struct Bound {
    int64_t rows = 0;
    std::vector<Projection> layers;  // kInputs for each layer
    Projection head;
    Memory activations, prepared;
    // (rows, ...) activations in `dtype`, padded rows.
    char *residual, *normed, *qkv, *attended, *y, *gate, *up;
    int64_t gate_stride;  // elements between rows of gate, and of up
  };
  // What belongs to one thread. Other threads read the attention's results.
  struct Private {
    Memory memory;
    char *residual, *normed, *attended, *prepared;
    float *q, *scratch, *acc, *max, *sum, *key;
  };

  void check() const;
  void copy_constants();
  void bind(Bound* bound, int64_t rows);
  Projection project(const std::vector<DecoderLinear>& linears, const std::vector<char*>& outs, int64_t out_stride,
                     const char* x, int64_t x_stride, int64_t rows) const;
  void make_int8_tables();
  void allocate_threads();
  size_t key_groups() const;  // scales of a key
  HeadCache cache(int64_t sequence, size_t layer, int64_t kv_head) const;
  char* row(char* rows, int64_t i, int64_t width) const;
  int useful_threads(int64_t rows) const;
  char* logits(int64_t row) const;
  // Calls fn with a Worker on each of the threads that `rows` rows keep busy.
  template <class Fn>
  void in_team(Bound* bound, const Fn& fn);

  DecoderConfig config_;
  DecoderModel model_;
  const DecoderOps* ops_;
  int64_t head_padded_, weights_ = 0;
  size_t element_, cache_element_;
  Memory constants_, keys_, values_, key_scales_, value_scales_, tables_;
  Bound one_, many_, batch_;
  std::vector<Private> threads_;
};

}  // namespace lowbit
