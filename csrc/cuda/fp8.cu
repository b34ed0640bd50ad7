// The launches of the FP8 kernels, compiled for sm_90a alone.
#include "gemm_fp8.cuh"
#include "launch.cuh"
#include "tensor_map.cuh"

namespace lowbit::cuda {
namespace {

template <bool kPE5m2, bool kQE5m2, int kCols, bool kBlocks>
void launch(const Fp8Product& x, int device, cudaStream_t stream) {
  using Tile = Fp8Tile<kCols>;
  allow_shared<fp8_kernel<kPE5m2, kQE5m2, kCols, kBlocks>>(device, Tile::kShared);
  const dim3 grid(static_cast<unsigned>(ceil_div(x.p.rows, Tile::kRows)),
                  static_cast<unsigned>(ceil_div(x.q.rows, kCols)));
  const auto map = [&](const Fp8Operand& o, int rows) {
    return tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, o.data, x.k, o.rows, o.stride, Tile::kK, rows);
  };
  fp8_kernel<kPE5m2, kQE5m2, kCols, kBlocks>
      <<<grid, Tile::kThreads, Tile::kShared, stream>>>(map(x.p, Tile::kRows), map(x.q, kCols), x);
  check(cudaGetLastError(), "fp8 kernel");
}

template <int kCols, bool kBlocks>
void launch_types(const Fp8Product& x, int device, cudaStream_t stream) {
  if (x.p.e5m2)
    x.q.e5m2 ? launch<true, true, kCols, kBlocks>(x, device, stream)
             : launch<true, false, kCols, kBlocks>(x, device, stream);
  else
    x.q.e5m2 ? launch<false, true, kCols, kBlocks>(x, device, stream)
             : launch<false, false, kCols, kBlocks>(x, device, stream);
}

}  // namespace

void fp8_product(const Fp8Product& x, int cols, int device, cudaStream_t stream) {
  const auto whole = [](Scales s) { return s == Scales::kTensor || s == Scales::kRow; };
  const bool blocks = !(whole(x.p.kind) && whole(x.q.kind));
  if (cols == 16)
    blocks ? launch_types<16, true>(x, device, stream) : launch_types<16, false>(x, device, stream);
  else if (cols == 64)
    blocks ? launch_types<64, true>(x, device, stream) : launch_types<64, false>(x, device, stream);
  else
    blocks ? launch_types<128, true>(x, device, stream) : launch_types<128, false>(x, device, stream);
}

}  // namespace lowbit::cuda
