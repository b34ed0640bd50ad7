// What sm_90a adds: barriers that count bytes, bulk copies, and products of a warpgroup.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace lowbit::cuda {

// Operands as the tensor memory accelerator knows them: boxes of a stage.
struct Maps {
  CUtensorMap x, codes, scales, zeros;
};

__device__ __forceinline__ uint32_t address_of(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void barrier_init(uint64_t* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(b)) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* b, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nretry:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra retry;\n}" ::
          "r"(address_of(b)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void copy_tile(void* to, const CUtensorMap* map, int k, int m, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          address_of(to)),
      "l"(map), "r"(k), "r"(m), "r"(address_of(barrier))
      : "memory");
}

__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, int i, int j, int k, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          address_of(to)),
      "l"(map), "r"(i), "r"(j), "r"(k), "r"(address_of(barrier))
      : "memory");
}
// Around asynchronous products into c: nothing else may touch it between the two.
template <int kSize>
__device__ __forceinline__ void hold(float (&c)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
template <int kSize>
__device__ __forceinline__ void multiply_begin(float (&c)[kSize]) {
  hold(c);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `kLeft` of the groups that were committed last are on their way.
template <int kLeft = 0, int kSize>
__device__ __forceinline__ void multiply_wait(float (&c)[kSize]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
  hold(c);
}

// Operands of inline assembly: accumulators c[i] .. c[i + 7], and the names of the first registers.
#define LOWBIT_8(i)                                                                                           \
  "+f"(c[(i) + 0]), "+f"(c[(i) + 1]), "+f"(c[(i) + 2]), "+f"(c[(i) + 3]), "+f"(c[(i) + 4]), "+f"(c[(i) + 5]), \
      "+f"(c[(i) + 6]), "+f"(c[(i) + 7])
#define LOWBIT_REGISTERS_32                                                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LOWBIT_REGISTERS_64                                                                                     \
  LOWBIT_REGISTERS_32                                                                                           \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

}  // namespace lowbit::cuda
