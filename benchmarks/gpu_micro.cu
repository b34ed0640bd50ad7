// What decides the design of the wgmma kernels, in seconds on a Hopper:
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a gpu_micro.cu -o gpu_micro && ./gpu_micro
// 1. Does a warp wait at the issue of a wgmma for the one before it (A in registers, A in shared memory)?
// 2. Does work of the same warpgroup (ALU, table lookups in shared memory) hide behind its own wgmma?
// 3. What do lookups of a second warpgroup cost the first one's wgmma (shared-memory bandwidth)?
// Cycles of clock64 on one SM; one CTA on each SM, so that power and clocks are those of a full device.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

#define FENCE() asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
#define COMMIT() asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")
#define WAIT(n) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory")
#define F4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
#define R32                                                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define R64                                                                                                         \
  R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
template <int N, bool kRegisters>
__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint64_t da, uint64_t b) {
  if constexpr (N == 64 && kRegisters)
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : F16(0), F16(16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else if constexpr (N == 64)
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R32 "}, %32, %33, 1, 1, 1, 0, 0;"
                 : F16(0), F16(16)
                 : "l"(da), "l"(b));
  else if constexpr (kRegisters)
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" R64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : F16(0), F16(16), F16(32), F16(48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" R64 "}, %64, %65, 1, 1, 1, 0, 0;"
                 : F16(0), F16(16), F16(32), F16(48)
                 : "l"(da), "l"(b));
}
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return (address >> 4 & 0x3FFF) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// kWork: 0 none, 1 `amount` dependent integer operations, 2 `amount` lookups in shared memory, between issue and wait.
template <int kWork>
__device__ __forceinline__ void work(uint32_t& x, uint32_t base, int amount) {
  if constexpr (kWork == 1)
#pragma unroll 16
    for (int i = 0; i < amount; ++i) asm volatile("mad.lo.u32 %0, %0, 1664525, 1013904223;" : "+r"(x));
  if constexpr (kWork == 2) {
    uint32_t y = 0;
#pragma unroll 16
    for (int i = 0; i < amount; ++i) {
      uint32_t v;
      const uint32_t entry = (x >> (i & 15) & 0xFF) * 128 + threadIdx.x % 32 * 4;
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(base + entry));
      y ^= v;
    }
    x ^= y;
  }
}
// The first warpgroup multiplies; the second does the same (kOther 1), nothing (0), or `work` alone (2).
template <int N, bool kRegisters, int kWork, int kCount, int kOther>
__global__ void __launch_bounds__(256, 1) kernel(int amount, int rounds, long long* out, uint32_t* sink) {
  extern __shared__ __align__(1024) uint8_t smem[];
  for (int i = threadIdx.x; i < 96 * 1024 / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(smem)[i] = 0;
  __syncthreads();
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  const uint64_t da = descriptor(base + 32768), db = descriptor(base + 49152);
  uint32_t x = threadIdx.x * 2654435761u | 1;
  if (kOther != 1 && threadIdx.x >= 128) {
    if (kOther == 2)
      for (int r = 0; r < rounds + 2; ++r) work<kWork>(x, base, amount);
    if (x == 77) sink[threadIdx.x] = x;
    return;
  }
  float c[N / 2] = {};
  uint32_t a[4] = {0, 0, 0, 0};
  long long issued = 0, total = 0;
#pragma unroll 1
  for (int r = 0; r < rounds; ++r) {
    const long long t0 = clock64();
#pragma unroll
    for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(c[i])::"memory");
    FENCE();
#pragma unroll
    for (int i = 0; i < kCount; ++i) mma<N, kRegisters>(c, a, da, db);
    COMMIT();
    const long long t1 = clock64();
    work<kWork>(x, base, amount);
    WAIT(0);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(c[i])::"memory");
    const long long t2 = clock64();
    issued += t1 - t0, total += t2 - t0;
  }
  float s = 0;
  for (int i = 0; i < N / 2; ++i) s += c[i];
  if (s == 1234.5f || x == 77) sink[threadIdx.x] = x;
  if (threadIdx.x % 128 == 0 && blockIdx.x == 0)
    out[threadIdx.x / 128 * 2] = issued / rounds, out[threadIdx.x / 128 * 2 + 1] = total / rounds;
}
template <int N, bool kRegisters, int kWork, int kCount, int kOther>
void run(const char* what, int amount) {
  static long long* out = nullptr;
  static uint32_t* sink = nullptr;
  if (!out) cudaMallocManaged(&out, 64), cudaMalloc(&sink, 4096);
  const auto k = kernel<N, kRegisters, kWork, kCount, kOther>;
  cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, 96 * 1024);
  for (int i = 0; i < 4; ++i) out[i] = 0;
  k<<<132, 256, 96 * 1024>>>(amount, 200, out, sink);
  const cudaError_t e = cudaDeviceSynchronize();
  printf("%-34s n %3d A in %s, %2d wgmma, work %4d: issued %5lld done %5lld | other issued %5lld done %5lld %s\n", what,
         N, kRegisters ? "registers" : "shared   ", kCount, amount, out[0], out[1], out[2], out[3],
         e ? cudaGetErrorString(e) : "");
}
template <int N, bool R>
void all() {
  run<N, R, 0, 1, 0>("1 issue, one warpgroup", 0), run<N, R, 0, 2, 0>("1 issue, one warpgroup", 0);
  run<N, R, 0, 4, 0>("1 issue, one warpgroup", 0), run<N, R, 0, 8, 0>("1 issue, one warpgroup", 0);
  run<N, R, 0, 4, 1>("1 issue, two warpgroups", 0), run<N, R, 0, 8, 1>("1 issue, two warpgroups", 0);
  for (int w : {0, 32, 64, 128, 256}) run<N, R, 1, 4, 0>("2 ALU behind its own wgmma", w);
  for (int w : {0, 16, 32, 64}) run<N, R, 2, 4, 0>("2 lookups behind its own wgmma", w);
  for (int w : {16, 32, 64}) run<N, R, 2, 4, 1>("2 lookups, two warpgroups", w);
  for (int w : {64, 256}) run<N, R, 2, 8, 2>("3 wgmma beside another's lookups", w);
}
int main() { all<64, true>(), all<64, false>(), all<128, true>(), all<128, false>(); }
