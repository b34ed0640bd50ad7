#include "cpu/conv/conv.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/costs.h"
#include "core/dispatch.h"
#include "core/int8_table.h"
#include "core/n16.h"
#include "core/parallel.h"
#include "core/registry.h"
#include "core/scratch.h"
#include "units.h"

namespace lowbit {

LOWBIT_REGISTRY(grouped_conv)

namespace {

// Patches of a tile as they are and as the kernel reads them take at most this, which is about half of an L2 cache,
// unless that is too few rows to decode a weight for.
constexpr int64_t kTileBytes = 1 << 20;
// Few rows of x are multiplied so many at a time, and the rest by other instructions, which add in another order: tiles
// end where a product of all rows would.
constexpr int64_t kRowsTogether = 4;
constexpr int64_t kLeastTileRows = 48, kMostTileRows = 516;
constexpr int64_t kElementBytes[] = {4, 2, 2, 1};  // by Dtype, of what x may be

// Where a row of the result stands.
struct Place {
  int64_t image, at[3];
  Place(const ConvShape& s, int64_t row) {
    for (int i = 2; i >= 0; --i) {
      at[i] = row % s.out[i];
      row /= s.out[i];
    }
    image = row;
  }
  void next(const ConvShape& s) {
    for (int i = 2; i >= 0; --i) {
      if (++at[i] < s.out[i]) return;
      at[i] = 0;
    }
    ++image;
  }
  int64_t first(const ConvShape& s, int i) const { return at[i] * s.stride[i] - s.before[i]; }
};

// Calls run(pixel or -1, count): pixels side by side, or zeros, in the order of the taps.
template <class Run>
void each_run(const ConvShape& s, const Place& place, const Run& run) {
  const int64_t w0 = place.first(s, 2);
  for (int64_t i = 0; i < s.kernel[0]; ++i) {
    const int64_t d = place.first(s, 0) + i * s.dilation[0];
    for (int64_t j = 0; j < s.kernel[1]; ++j) {
      const int64_t h = place.first(s, 1) + j * s.dilation[1];
      if (d < 0 || d >= s.size[0] || h < 0 || h >= s.size[1]) {
        run(int64_t{-1}, s.kernel[2]);
        continue;
      }
      const int64_t line = ((place.image * s.size[0] + d) * s.size[1] + h) * s.size[2];
      if (s.dilation[2] > 1) {
        for (int64_t k = 0; k < s.kernel[2]; ++k) {
          const int64_t w = w0 + k * s.dilation[2];
          run(w < 0 || w >= s.size[2] ? -1 : line + w, int64_t{1});
        }
        continue;
      }
      const int64_t begin = std::clamp<int64_t>(-w0, 0, s.kernel[2]);
      const int64_t end = std::clamp<int64_t>(s.size[2] - w0, begin, s.kernel[2]);
      if (begin > 0) run(int64_t{-1}, begin);
      if (begin < end) run(line + w0 + begin, end - begin);
      if (end < s.kernel[2]) run(int64_t{-1}, s.kernel[2] - end);
    }
  }
}

// Patches [first, last), one after another.
void gather(const ConvShape& s, const char* x, int64_t pixel_bytes, int64_t first, int64_t last, char* out) {
  Place place(s, first);
  for (int64_t row = first; row < last; ++row, place.next(s)) {
    each_run(s, place, [&](int64_t pixel, int64_t count) {
      const auto bytes = static_cast<size_t>(count * pixel_bytes);
      if (pixel < 0) {
        std::memset(out, 0, bytes);
      } else {
        std::memcpy(out, x + pixel * pixel_bytes, bytes);
      }
      out += bytes;
    });
  }
}

// The scales of patches [first, last): NaN for one with a pixel whose scale is that.
void gather_scales(const ConvShape& s, const float* scales, int64_t first, int64_t last, float* out) {
  Place place(s, first);
  for (int64_t row = first; row < last; ++row, ++out, place.next(s)) {
    *out = 0;
    each_run(s, place, [&](int64_t pixel, int64_t count) {
      for (int64_t i = 0; pixel >= 0 && i < count && !std::isnan(*out); ++i) {
        if (!(scales[pixel + i] <= *out)) *out = scales[pixel + i];
      }
    });
  }
}

int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// Rows of a tile, the same number for each thread as far as may be.
int64_t tile_rows(const Kernel& kernel, const Launch& l, int64_t row_bytes, int threads) {
  Launch one = l;
  one.m = 64;
  const int64_t bytes = row_bytes + static_cast<int64_t>(prepared_bytes(kernel, one)) / 64;
  int64_t rows = std::clamp(kTileBytes / bytes, kLeastTileRows, kMostTileRows);
  if (kernel.rows_per_task) rows = std::min(rows, kernel.rows_per_task);
  const int64_t tiles = ceil_div(ceil_div(l.m, rows), threads) * threads;
  return ceil_div(ceil_div(l.m, tiles), kRowsTogether) * kRowsTogether;
}

}  // namespace

void run_conv(const Kernel& kernel, Launch l, const ConvShape& s, int threads) {
  if (l.m == 0 || l.n == 0) return;
  const int64_t work = l.m * l.n * l.k / kConvProductsPerThread;
  threads = static_cast<int>(std::clamp<int64_t>(work, 1, std::max(1, usable_threads(threads))));
  alignas(64) int8_t table[kMaxEntries];
  if (kernel.compute == Dtype::kI8) set_int8_table(kernel.codec, kernel.bits, table, &l);
  const int64_t pixel_bytes = s.channels * kElementBytes[static_cast<int>(l.x_dtype)];
  const int64_t row_bytes = s.taps() * pixel_bytes, out_bytes = l.n * kElementBytes[static_cast<int>(l.out_dtype)];
  const float* scales = l.x_dtype == Dtype::kI8 ? l.x_scales : nullptr;
  const bool pointwise = s.taps() == 1 && s.rows() == s.pixels();  // patches lie there already
  const int64_t rows = tile_rows(kernel, l, row_bytes, threads);
  parallel(ceil_div(l.m, rows), threads, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    const int64_t patch_bytes = aligned(rows * row_bytes), scale_bytes = scales ? aligned(rows * 4) : 0;
    Launch tile = l;
    tile.m = rows;
    tile.x_stride = l.k;
    const auto prepared = static_cast<int64_t>(prepared_bytes(kernel, tile));
    char* memory = static_cast<char*>(scratch.get(static_cast<size_t>(patch_bytes + scale_bytes + prepared)));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * rows, last = std::min(first + rows, l.m);
      tile.m = last - first;
      tile.x = memory;
      tile.out = static_cast<char*>(l.out) + first * out_bytes;
      if (pointwise) {
        tile.x = static_cast<const char*>(l.x) + first * row_bytes;
      } else {
        gather(s, static_cast<const char*>(l.x), pixel_bytes, first, last, memory);
      }
      if (scales) {
        tile.x_scales = reinterpret_cast<float*>(memory + patch_bytes);
        gather_scales(s, scales, first, last, tile.x_scales);
      }
      place_prepared(kernel, memory + patch_bytes + scale_bytes, &tile);
      kernel.prepare(tile, 0, tile.m);
      const int64_t row_blocks = kernel.rows_per_task ? ceil_div(tile.m, kernel.rows_per_task) : 1;
      run_tasks(kernel, tile, 0, num_blocks(l.n) * row_blocks);
    }
    scratch.trim();
  });
}

const char* grouped_conv_isa(uint32_t isa_mask) { return isa_name(newest(units::grouped_conv::kAll, isa_mask).isa); }

void run_grouped_conv(GroupedConv c, const Kernel& decode, Launch w, uint32_t isa, int threads) {
  const ConvShape& s = c.shape;
  const RunGroupedConv run_lines = *newest(units::grouped_conv::kAll, isa).given;
  c.padded_n = ceil_div(c.n, kMostLanes) * kMostLanes;
  thread_local Scratch scratch;
  auto* weight = static_cast<float*>(scratch.get(static_cast<size_t>((c.padded_n + c.n) * w.k) * sizeof(float)));
  float* rows = weight + c.padded_n * w.k;
  w.m = 1;
  w.out = rows;
  w.out_dtype = Dtype::kF32;
  w.out_stride = w.k;
  run(decode, w, 1);
  for (int64_t k = 0; k < w.k; ++k) {
    for (int64_t n = 0; n < c.n; ++n) weight[k * c.padded_n + n] = rows[n * w.k + k];
    std::fill(weight + k * c.padded_n + c.n, weight + (k + 1) * c.padded_n, 0.0f);
  }
  c.weight = weight;
  const int64_t work = s.rows() * c.n * w.k / kConvProductsPerThread;
  threads = static_cast<int>(std::clamp<int64_t>(work, 1, std::max(1, usable_threads(threads))));
  parallel(s.batch * s.out[0] * s.out[1], threads, [&](int64_t begin, int64_t end) { run_lines(c, begin, end); });
  scratch.trim();
}

}  // namespace lowbit
