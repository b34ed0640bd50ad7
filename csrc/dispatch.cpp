#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "int8.h"
#include "layout.h"
#include "parallel.h"

namespace lowbit {

#define LOWBIT_FOREACH_UNIT(X) X(scalar) X(scalar_int8) X(avx2) X(avx2_int8) X(avx512) X(avx512bf16) X(avx512vnni)
#define LOWBIT_DECLARE(unit) const Kernel* kernels_##unit(int* count);
LOWBIT_FOREACH_UNIT(LOWBIT_DECLARE)
void embed_rows(const Launch& l, int bits, Scope scope, const int64_t* indices, int64_t begin, int64_t end,
                uint8_t* codes);

namespace {

struct IsaName {
  Isa isa;
  const char* name;
  uint32_t cap;  // what LOWBIT_ISA=name leaves
};
constexpr IsaName kIsaNames[] = {
    {kScalar, "scalar", kScalar},
    {kAvx2, "avx2", kScalar | kAvx2},
    {kAvx512, "avx512", kScalar | kAvx2 | kAvx512},
    {kAvx512Bf16, "avx512bf16", kScalar | kAvx2 | kAvx512 | kAvx512Bf16},
    {kAvx512Vnni, "avx512vnni", kScalar | kAvx2 | kAvx512 | kAvx512Vnni},
};

std::vector<const Kernel*> collect() {
  std::vector<const Kernel*> all;
  int count = 0;
  const Kernel* rows = nullptr;
#define LOWBIT_COLLECT(unit)     \
  rows = kernels_##unit(&count); \
  for (int i = 0; i < count; ++i) all.push_back(rows + i);
  LOWBIT_FOREACH_UNIT(LOWBIT_COLLECT)
  return all;
}

// One buffer per calling thread, kept between calls so that decoding allocates nothing.
struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
  void* get(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      data = nullptr;
      size = 0;
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      data = std::aligned_alloc(64, rounded);
      if (!data) throw std::bad_alloc();
      size = rounded;
    }
    return data;
  }
};
// More than this is returned to the system after the call.
constexpr size_t kKeptScratch = size_t{16} << 20;

int size_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : dtype == Dtype::kI8 ? 1 : 2; }

// 255 * 128 * 65536 < 2^31.
constexpr int64_t kMaxInt8Group = 65536;

// Below this many multiply-adds a second thread costs more than it saves (a parallel region takes about 3 us).
constexpr int64_t kWorkPerThread = 64 * 1024;

}  // namespace

uint32_t cap_isa(uint32_t detected, const char* value) {
  if (!value || !*value) return detected;
  for (const IsaName& entry : kIsaNames) {
    if (std::strcmp(entry.name, value) == 0) return detected & entry.cap;
  }
  throw std::invalid_argument(std::string("LOWBIT_ISA must be scalar, avx2, avx512, avx512bf16 or avx512vnni, got '") +
                              value + "'");
}

uint32_t active_isa() {
  static const uint32_t mask = cap_isa(detect_isa(), std::getenv("LOWBIT_ISA"));
  return mask;
}

const char* isa_name(Isa isa) {
  for (const IsaName& entry : kIsaNames) {
    if (entry.isa == isa) return entry.name;
  }
  return "?";
}

std::span<const Kernel* const> kernels() {
  static const std::vector<const Kernel*> all = collect();
  return all;
}

const char* rejection(const Kernel& k, const Desc& d, uint32_t isa_mask) {
  if (k.op != d.op) return "another op";
  if (k.bits != d.bits) return "another bit width";
  if (k.codec == Codec::kInt && d.codec != Codec::kInt) return "integers only";
  if (k.compute == Dtype::kI8 && k.codec != d.codec) return "codebooks only";
  if (k.scope != d.scope) return "another table scope";
  if (!(isa_mask & k.isa)) return "instruction set not available";
  if (!k.exact_x[static_cast<int>(d.x)]) {
    return d.x == Dtype::kI8 ? "needs float activations" : "would round the activations";
  }
  if (k.compute == Dtype::kI8 && (d.group < d.k ? d.group : d.k) > kMaxInt8Group) return "int32 sums would overflow";
  if (k.chunk_groups && d.group < d.k && d.group % k.span != 0) return "group is not a multiple of the row's span";
  return nullptr;
}

double cost(const Kernel& k, const Desc& d) {
  if (d.m <= 1) return k.cost.single;
  return k.cost.fixed + k.cost.pass * static_cast<double>(ceil_div(d.m, k.cost.rows_per_pass));
}

const Kernel* select(const Desc& desc, uint32_t isa_mask) {
  const Kernel* best = nullptr;
  for (const Kernel* k : kernels()) {
    if (rejection(*k, desc, isa_mask)) continue;
    // The newest instruction set wins; costs compare rows of one set, whose constants were measured together.
    if (!best || k->isa > best->isa || (k->isa == best->isa && cost(*k, desc) <= cost(*best, desc))) best = k;
  }
  return best;
}

void run(const Kernel& kernel, Launch launch, int threads) {
  if (launch.m == 0 || launch.n == 0) return;
  int8_t table_i8[kMaxEntries];
  if (kernel.compute == Dtype::kI8) {
    launch.table_step =
        kernel.codec == Codec::kInt ? 1.0f : round_table(launch.table, 1 << kernel.bits, launch.table_step, table_i8);
    launch.table_i8 = table_i8;
  }
  const int64_t work = launch.m * launch.n * launch.k;
  if (work / kWorkPerThread < threads) threads = static_cast<int>(work / kWorkPerThread);

  thread_local Scratch scratch;
  if (kernel.prepare) {
    const bool bytes = kernel.compute == Dtype::kI8;
    launch.prepared_stride = ceil_div(launch.k, kernel.span) * kernel.span;
    // An odd number of lines: rows then start in different sets of a cache.
    if (bytes) launch.prepared_stride = (ceil_div(launch.k, 64) | 1) * 64;
    const bool sums = bytes || (launch.zero != ZeroMode::kNone && kernel.chunk_groups);
    const size_t x_bytes = static_cast<size_t>(launch.m * launch.prepared_stride) * size_of(kernel.compute);
    const size_t sum_offset = (x_bytes + 63) / 64 * 64;
    const size_t sum_bytes = sums ? static_cast<size_t>(launch.m * launch.num_groups) * sizeof(float) : 0;
    const bool quantizes = bytes && launch.x_dtype != Dtype::kI8;
    const size_t scale_bytes = quantizes ? static_cast<size_t>(launch.m) * sizeof(float) : 0;
    char* base = static_cast<char*>(scratch.get(sum_offset + sum_bytes + scale_bytes));
    launch.prepared = base;
    launch.x_sums = sums ? reinterpret_cast<float*>(base + sum_offset) : nullptr;
    if (quantizes) launch.x_scales = reinterpret_cast<float*>(base + sum_offset + sum_bytes);
    // Converting this many elements takes about as long as starting a parallel region.
    const int prepare_threads = launch.m * launch.k < 64 * 1024 ? 1 : threads;
    parallel(launch.m, prepare_threads, [&](int64_t b, int64_t e) { kernel.prepare(launch, b, e); });
  }
  const int64_t row_blocks = kernel.rows_per_task ? ceil_div(launch.m, kernel.rows_per_task) : 1;
  parallel(num_blocks(launch.n) * row_blocks, threads, [&](int64_t b, int64_t e) { kernel.run(launch, b, e); });
  if (scratch.size > kKeptScratch) scratch = Scratch{};
}

void embed(Launch launch, int bits, Scope scope, const int64_t* indices, int64_t count, int threads) {
  const int useful = static_cast<int>(count * launch.k / kWorkPerThread);
  parallel(count, useful < threads ? useful : threads, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(static_cast<size_t>(launch.k));
    embed_rows(launch, bits, scope, indices, begin, end, codes.data());
  });
}

}  // namespace lowbit
