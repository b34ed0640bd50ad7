// The launches of the FP8 kernels, compiled for sm_90a alone.
#include "gemm_fp8.cuh"
#include "launch.cuh"
#include "tensor_map.cuh"

namespace lowbit::cuda {
namespace {

template <bool kPE5m2, bool kQE5m2, int kCols, BlockScales kBlocks>
void launch(const Fp8Product& x, int device, cudaStream_t stream) {
  using Tile = Fp8Tile<kCols>;
  allow_shared<fp8_kernel<kPE5m2, kQE5m2, kCols, kBlocks>>(device, Tile::kShared);
  const auto grid = static_cast<unsigned>(ceil_div(x.p.rows, Tile::kRows) * ceil_div(x.q.rows, kCols));
  const auto map = [&](const Fp8Operand& o, int rows) {
    return tensor_map<2>(CU_TENSOR_MAP_DATA_TYPE_UINT8, o.data, {x.k, o.rows}, {o.stride}, {Tile::kK, rows}, true);
  };
  fp8_kernel<kPE5m2, kQE5m2, kCols, kBlocks>
      <<<grid, Tile::kThreads, Tile::kShared, stream>>>(map(x.p, Tile::kRows), map(x.q, kCols), x);
  check(cudaGetLastError(), "fp8 kernel");
}

template <int kCols, BlockScales kBlocks>
void launch_types(const Fp8Product& x, int device, cudaStream_t stream) {
  if (x.p.e5m2)
    x.q.e5m2 ? launch<true, true, kCols, kBlocks>(x, device, stream)
             : launch<true, false, kCols, kBlocks>(x, device, stream);
  else
    x.q.e5m2 ? launch<false, true, kCols, kBlocks>(x, device, stream)
             : launch<false, false, kCols, kBlocks>(x, device, stream);
}

template <int kCols>
void launch_scales(const Fp8Product& x, int device, cudaStream_t stream) {
  switch (block_scales(x.p.kind, x.q.kind)) {
    case BlockScales::kNone:
      return launch_types<kCols, BlockScales::kNone>(x, device, stream);
    case BlockScales::kRows:
      return launch_types<kCols, BlockScales::kRows>(x, device, stream);
    case BlockScales::kRowsAndColumns:
      if constexpr (kCols <= 64) return launch_types<kCols, BlockScales::kRowsAndColumns>(x, device, stream);
      throw std::invalid_argument("columns with scales of their own take tiles of 64 at most");
  }
}

}  // namespace

void fp8_product(const Fp8Product& x, int cols, int device, cudaStream_t stream) {
  cols == 16   ? launch_scales<16>(x, device, stream)
  : cols == 64 ? launch_scales<64>(x, device, stream)
               : launch_scales<128>(x, device, stream);
}

}  // namespace lowbit::cuda
