// The merged kernel table and the choice from it, a pure function of the request and a mask. Request, config, launch,
// as on the GPU: here a config is an entry of the table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/kernel.h"

namespace lowbit {

std::span<const Kernel* const> kernels();

// Why a kernel cannot serve a request on a mask of instruction sets; nullptr if it can.
const char* rejection(const Kernel& kernel, const Request& request, uint32_t isa_mask);
// How many of `request.threads` a kernel uses: no more than it has tasks, and one where the work is tiny or after a
// fork.
int threads_for(const Kernel& kernel, const Request& request);
// Estimated time in nanoseconds on that many threads: the largest share of a thread, plus the parallel region.
double cost(const Kernel& kernel, const Request& request);
// Of the legal kernels of the newest instruction set, the one of least work on one thread, whatever the number of
// threads; nullptr if there is none.
const Kernel* select(const Request& request, uint32_t isa_mask);

// The memory in which `prepare` works: x as the kernel reads it, and sums of its groups where they are needed.
size_t prepared_bytes(const Kernel& kernel, const Launch& launch);
// Sets `prepared`, `prepared_stride` and `x_sums` to `prepared_bytes` bytes at `memory`, aligned to 64.
void place_prepared(const Kernel& kernel, void* memory, Launch* launch);

// Whether two kernels make the same of one x.
bool prepares_alike(const Kernel& a, const Launch& of_a, const Kernel& b, const Launch& of_b);

// Sets `table_i8` (kMaxEntries bytes at `memory`) and `table_step` for int8 x, from the step that the weight names.
void set_int8_table(Codec codec, int bits, int8_t* memory, Launch* launch);
// Tasks of a kernel on prepared x. Where a result is not finite and the kernel multiplies x with parts of the weights
// (codes and zeros), which makes infinity - infinity of an infinity in x, it is computed anew from decoded weights.
void run_tasks(const Kernel& kernel, const Launch& launch, int64_t task_begin, int64_t task_end);
// The kernels that `run_tasks` ran since the last call of this function, on any thread of the process.
std::vector<const Kernel*> take_kernels_run();

// One product of a call. `launch.prepared`, `x_sums` are set by `run_many`.
struct Call {
  const Kernel* kernel = nullptr;
  Launch launch = {};
};
// Runs independent products in one parallel region of up to `threads` OpenMP threads. Calls whose x and whose way of
// preparing it are the same share the prepared x. Each result is bit for bit that of a run alone.
void run_many(std::span<Call> calls, int threads);
void run(const Kernel& kernel, const Launch& launch, int threads);

// out[i] = W[indices[i]] for `count` valid indices.
void embed(Launch launch, int bits, Scope scope, const int64_t* indices, int64_t count, int threads);

}  // namespace lowbit
