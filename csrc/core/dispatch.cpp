#include "core/dispatch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "core/address.h"
#include "core/costs.h"
#include "core/int8_table.h"
#include "core/n16.h"
#include "core/nonfinite.h"
#include "core/parallel.h"
#include "core/registry.h"
#include "core/scratch.h"
#include "core/trits.h"
#include "units.h"

#define LOWBIT_DECLARE_TABLE(family, isa) \
  namespace units::family {               \
  extern const KernelTable isa;           \
  }
#define LOWBIT_LIST_TABLE(family, isa) &units::family::isa,

namespace lowbit {

LOWBIT_REGISTRY(embedding)
LOWBIT_REGISTRY(trits)
LOWBIT_FOREACH_TABLE(LOWBIT_DECLARE_TABLE)

namespace {

constexpr const KernelTable* kTables[] = {LOWBIT_FOREACH_TABLE(LOWBIT_LIST_TABLE)};

std::vector<Kernel> collect() {
  std::vector<Kernel> all;
  for (const KernelTable* table : kTables) {
    for (int i = 0; i < table->count; ++i) {
      all.push_back(table->kernels[i]);
      all.back().cost = cost_of(all.back());
    }
  }
  return all;
}

size_t size_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : dtype == Dtype::kI8 || dtype == Dtype::kB1 ? 1 : 2; }

int64_t tasks_of(const Kernel& k, int64_t m, int64_t n) {
  return num_blocks(n) * (k.rows_per_task ? ceil_div(m, k.rows_per_task) : 1);
}

// All tasks of a product on one thread, in nanoseconds.
double work_ns(const Kernel& k, int64_t m, int64_t n, int64_t depth, int64_t group) {
  double ps = k.cost.picoseconds(m, std::min(group, depth));
  if (ps <= 0) ps = kUnratedPs;
  return ps * 1e-3 * static_cast<double>(num_blocks(n) * kBlockN) * static_cast<double>(depth);
}

int useful_threads(double ns, int64_t tasks, int threads) {
  const double most = ns / kLeastNsPerThread;
  if (most < threads) threads = static_cast<int>(most);
  if (tasks < threads) threads = static_cast<int>(tasks);
  return threads < 1 ? 1 : threads;
}

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t prepared_stride(const Kernel& kernel, const Launch& l) {
  // An odd number of lines: rows then start in different sets of a cache.
  if (kernel.compute == Dtype::kI8) return (ceil_div(l.k, 64) | 1) * 64;
  if (kernel.compute == Dtype::kB1) return num_chunks(l.k) * (kChunkK / 8);
  return ceil_div(l.k, kernel.span) * kernel.span * kernel.terms;
}
bool needs_sums(const Kernel& kernel, const Launch& l) {
  return kernel.compute == Dtype::kI8 || (l.zero != ZeroMode::kNone && kernel.chunk_groups);
}
// Whether `prepare` writes scales of x.
bool quantizes(const Kernel& kernel, const Launch& l) {
  return kernel.compute == Dtype::kI8 && l.x_dtype != Dtype::kI8;
}
size_t x_bytes(const Kernel& kernel, const Launch& l) {
  return aligned(static_cast<size_t>(l.m * prepared_stride(kernel, l)) * size_of(kernel.compute));
}
// Weights whose products are summed before they meet a scale.
int64_t group_of(const Kernel& kernel, const Launch& l) {
  return kernel.compute == Dtype::kI8 ? segments_of(l).size : l.group;
}
size_t sum_bytes(const Kernel& kernel, const Launch& l) {
  if (!needs_sums(kernel, l)) return 0;
  const Segments s = segments_of(l);
  const int64_t sums = kernel.compute == Dtype::kI8 ? s.count * s.parts : l.num_groups;
  return static_cast<size_t>(l.m * sums) * sizeof(float);
}

bool share_x(const Call& a, const Call& b) {
  const Launch &x = a.launch, &y = b.launch;
  return x.x == y.x && x.x_dtype == y.x_dtype && x.x_stride == y.x_stride && x.m == y.m && x.k == y.k &&
         prepares_alike(*a.kernel, x, *b.kernel, y);
}

// Places what each call prepares from address `base` on; returns the bytes that this takes.
size_t place_all(std::span<Call> calls, uintptr_t base) {
  size_t used = 0;
  for (size_t i = 0; i < calls.size(); ++i) {
    Launch& l = calls[i].launch;
    if (!calls[i].kernel->prepare) continue;
    size_t same = 0;
    while (!share_x(calls[same], calls[i])) ++same;
    if (same < i) {
      const Launch& first = calls[same].launch;
      l.prepared = first.prepared;
      l.prepared_stride = first.prepared_stride;
      l.x_sums = first.x_sums;
      if (quantizes(*calls[i].kernel, l)) l.x_scales = first.x_scales;
      continue;
    }
    place_prepared(*calls[i].kernel, reinterpret_cast<void*>(base + used), &l);
    used += aligned(prepared_bytes(*calls[i].kernel, l));
  }
  return used;
}

bool prepared_before(std::span<const Call> calls, size_t i) {
  for (size_t j = 0; j < i; ++j) {
    if (calls[j].launch.prepared == calls[i].launch.prepared) return true;
  }
  return false;
}

// The kernels that ran, a set: a slot is empty or holds a kernel, at its hash or after it.
constexpr size_t kRanSlots = 1024;
std::atomic<const Kernel*> ran[kRanSlots];

void note(const Kernel& kernel) {
  for (size_t slot = reinterpret_cast<uintptr_t>(&kernel) / 16;; ++slot) {
    std::atomic<const Kernel*>& at = ran[slot % kRanSlots];
    const Kernel* found = at.load(std::memory_order_relaxed);
    if (found == &kernel) return;
    if (!found && (at.compare_exchange_strong(found, &kernel, std::memory_order_relaxed) || found == &kernel)) return;
  }
}

// Tasks of a kernel. Trits of a block become codes of 2 bits for all of its tasks.
void run_kernel(const Kernel& kernel, const Launch& l, int64_t begin, int64_t end) {
  note(kernel);
  if (!l.trits) return kernel.run(l, begin, end);
  const ExpandTrits expand = *newest(units::trits::kAll, active_isa()).given;
  const int64_t bytes = num_chunks(l.k) * chunk_bytes(kTritBits), tasks = tasks_of(kernel, l.m, kBlockN);
  thread_local Scratch scratch;
  auto* codes = static_cast<uint8_t*>(scratch.get(static_cast<size_t>(bytes)));
  Launch expanded = l;
  expanded.trits = false;
  for (int64_t task = begin; task < end;) {
    const int64_t block = task / tasks, last = std::min((block + 1) * tasks, end);
    expand(l.codes + block * block_bytes(l.k, kTritBits, true), l.k, codes);
    // A kernel adds the offset of its block.
    expanded.codes = pointer<const uint8_t>(reinterpret_cast<uintptr_t>(codes) - static_cast<uintptr_t>(block * bytes));
    kernel.run(expanded, task, last);
    task = last;
  }
  scratch.trim();
}

// Whether an infinity in x may meet terms of both signs in place of one weight: zeros that are multiplied apart from
// the codes, and 8-bit integers as two bf16 numbers (bf16_int8-inl.h).
bool splits_weights(const Kernel& kernel, const Launch& l) {
  if (kernel.op != Op::kLinear || !kernel.chunk_groups || kernel.compute == Dtype::kI8) return false;
  return l.zero != ZeroMode::kNone || (kernel.compute == Dtype::kBf16 && kernel.codec == Codec::kInt);
}

// The kernel that serves what `kernel` does and applies scales and zeros before it multiplies.
const Kernel& decoding_kernel(const Kernel& kernel, const Launch& l) {
  const Request request{.op = Op::kLinear,
                        .x = l.x_dtype,
                        .codec = kernel.codec,
                        .bits = kernel.bits,
                        .scope = kernel.scope,
                        .zero = l.zero,
                        .m = l.m,
                        .n = l.n,
                        .k = l.k,
                        .group = l.group};
  const Kernel* best = nullptr;
  for (const Kernel* k : kernels()) {
    if (!k->chunk_groups && !rejection(*k, request, active_isa()) && (!best || k->isa > best->isa)) best = k;
  }
  if (!best) throw std::logic_error(std::string(kernel.name) + " has no kernel that decodes its weights");
  return *best;
}

// Rows [first, last) of x and a block of 64 columns by another kernel.
void run_block(const Kernel& kernel, Launch l, int64_t block, int64_t first, int64_t last) {
  const auto size = static_cast<int64_t>(size_of(l.x_dtype)), out_size = static_cast<int64_t>(size_of(l.out_dtype));
  Epilogue epilogue{};
  if (l.epilogue) {
    epilogue = *l.epilogue;
    const auto from = [&](const void* p, int64_t stride) {
      return p ? static_cast<const char*>(p) + first * stride * static_cast<int64_t>(size_of(epilogue.dtype)) : nullptr;
    };
    epilogue.gate = from(epilogue.gate, epilogue.gate_stride);
    epilogue.residual = from(epilogue.residual, epilogue.residual_stride);
    l.epilogue = &epilogue;
  }
  l.m = last - first;
  l.x = static_cast<const char*>(l.x) + first * l.x_stride * size;
  l.out = static_cast<char*>(l.out) + first * l.out_stride * out_size;
  thread_local Scratch scratch;
  place_prepared(kernel, scratch.get(prepared_bytes(kernel, l)), &l);
  kernel.prepare(l, 0, l.m);
  const int64_t tasks = tasks_of(kernel, l.m, kBlockN);
  run_kernel(kernel, l, block * tasks, (block + 1) * tasks);
  scratch.trim();
}

// Tasks of one call that thread `index` of `count` runs, when all calls stand one after another on a line as long as
// their work. Tasks begin at multiples of 64 columns, so two threads write the same cache line only at the ends of the
// rows of an m > 1 whose row is not a whole number of lines.
struct Share {
  double start, task_ns;
  int64_t tasks;
  int64_t edge(double at) const {
    const double tasks_before = (at - start) / task_ns + 0.5;
    return tasks_before <= 0                            ? 0
           : tasks_before >= static_cast<double>(tasks) ? tasks
                                                        : static_cast<int64_t>(tasks_before);
  }
};

}  // namespace

std::span<const Kernel* const> kernels() {
  static const std::vector<Kernel> all = collect();
  static const std::vector<const Kernel*> addresses = [] {
    std::vector<const Kernel*> found;
    for (const Kernel& kernel : all) found.push_back(&kernel);
    return found;
  }();
  return addresses;
}

const char* rejection(const Kernel& k, const Request& d, uint32_t isa_mask) {
  if (k.op != d.op) return "another op";
  if (k.bits != d.bits) return "another bit width";
  // A table serves every codec.
  if (k.codec != Codec::kLut && k.codec != d.codec) {
    return k.codec == Codec::kInt ? "integers only" : k.codec == Codec::kE4m3 ? "E4M3 only" : "E5M2 only";
  }
  if (k.compute == Dtype::kI8 && k.codec == Codec::kLut && d.codec == Codec::kInt) return "codebooks only";
  if (k.scope != d.scope) return "another table scope";
  const bool takes_zeros = k.compute != Dtype::kB1 && (k.scope != Scope::kColumn || k.compute != Dtype::kBf16);
  if (!takes_zeros && d.zero != ZeroMode::kNone) return "no zero points";
  // A look-up among 256 entries costs more than the second product saves.
  if (k.terms > 1 && k.bits == 8 && d.codec == Codec::kInt) return "codebooks only";
  if (k.bf16_table && !d.bf16_table) return "table is not exact in bf16";
  if (!(isa_mask & k.isa)) return "instruction set not available";
  if (!k.exact_x[d.x]) {
    return d.x == Dtype::kI8 || d.x == Dtype::kB1 ? "needs float activations" : "would round the activations";
  }
  if (k.chunk_groups && d.group < d.k && d.group % k.span != 0 && !(k.half_groups && d.group == kHalfChunk)) {
    return "group is not a multiple of the kernel's span";
  }
  return nullptr;
}

int threads_for(const Kernel& k, const Request& d) {
  return useful_threads(work_ns(k, d.m, d.n, d.k, d.group), tasks_of(k, d.m, d.n), usable_threads(d.threads));
}

double cost(const Kernel& k, const Request& d) {
  const double ns = work_ns(k, d.m, d.n, d.k, d.group);
  const int64_t tasks = tasks_of(k, d.m, d.n);
  const int threads = threads_for(k, d);
  if (threads == 1) return ns;
  return ns * static_cast<double>(ceil_div(tasks, threads)) / static_cast<double>(tasks) + kRegionNs;
}

const Kernel* select(const Request& request, uint32_t isa_mask) {
  const Kernel* best = nullptr;
  for (const Kernel* k : kernels()) {
    if (rejection(*k, request, isa_mask)) continue;
    // The widest vectors win, and of equal ones the least work. That of one thread: another number of threads must not
    // take another kernel, which adds in another order.
    const auto width = [](const Kernel& of) { return std::min(of.isa, kAvx512); };
    const auto work = [&](const Kernel& of) { return work_ns(of, request.m, request.n, request.k, request.group); };
    if (!best || width(*k) > width(*best) || (width(*k) == width(*best) && work(*k) <= work(*best))) best = k;
  }
  return best;
}

size_t prepared_bytes(const Kernel& kernel, const Launch& launch) {
  const int64_t rows = quantizes(kernel, launch) ? launch.m : 0;
  const size_t scales = static_cast<size_t>(rows * segments_of(launch).blocks) * sizeof(float);
  return x_bytes(kernel, launch) + sum_bytes(kernel, launch) + scales;
}

bool prepares_alike(const Kernel& a, const Launch& x, const Kernel& b, const Launch& y) {
  const bool sums = needs_sums(a, x);
  return a.prepare == b.prepare && a.span == b.span && sums == needs_sums(b, y) &&
         (!sums || group_of(a, x) == group_of(b, y)) && (a.compute != Dtype::kI8 || x.x_group == y.x_group);
}

void place_prepared(const Kernel& kernel, void* memory, Launch* launch) {
  const uintptr_t sums = reinterpret_cast<uintptr_t>(memory) + x_bytes(kernel, *launch);
  launch->prepared = memory;
  launch->prepared_stride = prepared_stride(kernel, *launch);
  launch->x_sums = needs_sums(kernel, *launch) ? reinterpret_cast<float*>(sums) : nullptr;
  if (quantizes(kernel, *launch)) launch->x_scales = reinterpret_cast<float*>(sums + sum_bytes(kernel, *launch));
}

void set_int8_table(Codec codec, int bits, int8_t* memory, Launch* l) {
  l->table_i8 = memory;
  l->table_step = codec == Codec::kInt ? 1.0f : round_table(l->table, 1 << bits, l->table_step, memory);
}

void run_tasks(const Kernel& kernel, const Launch& l, int64_t begin, int64_t end) {
  run_kernel(kernel, l, begin, end);
  if (!splits_weights(kernel, l)) return;
  if (l.m == 1 && all_finite(l.out, l.out_dtype, begin * kBlockN, std::min(end * kBlockN, l.n))) return;
  const int64_t rows_per_task = kernel.rows_per_task ? kernel.rows_per_task : l.m;
  const int64_t row_blocks = ceil_div(l.m, rows_per_task);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / row_blocks, row_end = std::min((task % row_blocks + 1) * rows_per_task, l.m);
    const int64_t column = block * kBlockN, column_end = std::min(column + kBlockN, l.n);
    const auto spoilt = [&](int64_t row) {
      return row < row_end &&
             !all_finite(l.out, l.out_dtype, row * l.out_stride + column, row * l.out_stride + column_end) &&
             !any_nan(l.x, l.x_dtype, row * l.x_stride, row * l.x_stride + l.k);
    };
    for (int64_t row = task % row_blocks * rows_per_task; row < row_end; ++row) {
      const int64_t first = row;
      while (spoilt(row)) ++row;
      if (first < row) run_block(decoding_kernel(kernel, l), l, block, first, row);
    }
  }
}

std::vector<const Kernel*> take_kernels_run() {
  std::vector<const Kernel*> taken;
  for (std::atomic<const Kernel*>& slot : ran) {
    if (const Kernel* kernel = slot.exchange(nullptr, std::memory_order_relaxed)) taken.push_back(kernel);
  }
  return taken;
}

void run_many(std::span<Call> calls, int threads) {
  // Calls without results are left out; those that stay are moved to the front.
  size_t count = 0;
  for (const Call& c : calls) {
    if (c.launch.m > 0 && c.launch.n > 0) calls[count++] = c;
  }
  calls = calls.first(count);
  thread_local Scratch scratch;
  const size_t table_bytes = calls.size() * kMaxEntries, bytes = table_bytes + place_all(calls, 0);
  char* memory = static_cast<char*>(scratch.get(bytes));
  place_all(calls, reinterpret_cast<uintptr_t>(memory) + table_bytes);
  for (size_t i = 0; i < calls.size(); ++i) {
    const Kernel& kernel = *calls[i].kernel;
    Launch& l = calls[i].launch;
    if (kernel.compute != Dtype::kI8) continue;
    set_int8_table(kernel.codec, kernel.bits, reinterpret_cast<int8_t*>(memory) + i * kMaxEntries, &l);
  }
  for (size_t i = 0; i < calls.size(); ++i) {
    const Kernel& kernel = *calls[i].kernel;
    const Launch& l = calls[i].launch;
    if (!kernel.prepare || prepared_before(calls, i)) continue;
    const int prepare_threads = l.m * l.k < kLeastConversions ? 1 : threads;
    parallel(l.m, prepare_threads, [&](int64_t b, int64_t e) { kernel.prepare(l, b, e); });
  }

  constexpr size_t kMaxShares = 16;
  for (size_t first = 0; first < calls.size(); first += kMaxShares) {
    const std::span<const Call> part =
        std::span<const Call>(calls).subspan(first, std::min(kMaxShares, calls.size() - first));
    Share shares[kMaxShares];
    double total_ns = 0;
    int64_t tasks = 0;
    for (size_t i = 0; i < part.size(); ++i) {
      const Launch& l = part[i].launch;
      const int64_t own = tasks_of(*part[i].kernel, l.m, l.n);
      const double ns = work_ns(*part[i].kernel, l.m, l.n, l.k, group_of(*part[i].kernel, l));
      shares[i] = {total_ns, ns / static_cast<double>(own), own};
      total_ns += ns;
      tasks += own;
    }
    const int used = useful_threads(total_ns, tasks, threads);
    parallel_threads(used, [&](int64_t index, int64_t num_threads) {
      const double at = static_cast<double>(index) / static_cast<double>(num_threads);
      const double end = static_cast<double>(index + 1) / static_cast<double>(num_threads);
      for (size_t i = 0; i < part.size(); ++i) {
        const int64_t b = shares[i].edge(total_ns * at),
                      e = index + 1 == num_threads ? shares[i].tasks : shares[i].edge(total_ns * end);
        if (b < e) run_tasks(*part[i].kernel, part[i].launch, b, e);
      }
    });
  }
  scratch.trim();
}

void run(const Kernel& kernel, const Launch& launch, int threads) {
  Call call{.kernel = &kernel, .launch = launch};
  run_many({&call, 1}, threads);
}

void embed(Launch launch, int bits, Scope scope, const int64_t* indices, int64_t count, int threads) {
  const EmbedRows rows = *newest(units::embedding::kAll, active_isa()).given;
  const int useful = static_cast<int>(count * launch.k / kEmbeddingWeightsPerThread);
  parallel(count, useful < threads ? useful : threads, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(static_cast<size_t>(launch.k));
    rows(launch, bits, scope, indices, begin, end, codes.data());
  });
}

}  // namespace lowbit
