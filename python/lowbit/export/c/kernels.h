// Integer kernels of an exported network: plain C99, no dependency, no allocation, bit for bit lowbit's Python.
// MODEL_BITS is 8 or 16. MODEL_DYADIC: factors are multiplier / 2^31 / 2^shift (TFLite), else 2^-shift (Qm.n).
// MODEL_ROUNDING: 0 floor, 1 nearest with ties up, 2 nearest with ties away from zero.
// The license of lowbit's files, Apache-2.0, holds for this one.
#ifndef MODEL_KERNELS_H
#define MODEL_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if MODEL_BITS == 8
typedef int8_t model_value;
#else
typedef int16_t model_value;
#endif

// Shifts of negative numbers to the right are those of the division's floor, as every known compiler has them.
typedef char model_shift_is_arithmetic[(-3 >> 1) == -2 ? 1 : -1];

// A factor on sums, one for all channels (step 0) or one for each (step 1).
typedef struct {
  const int32_t* multipliers;
  const int8_t* shifts;
  int32_t step;
} model_factor;

// Where results lie: the integer of 0, and the range that they are clamped to.
typedef struct {
  int32_t zero, low, high;
} model_range;

typedef struct {
  int32_t in_channels, in_height, in_width;
  int32_t out_channels, out_height, out_width;
  int32_t kernel_height, kernel_width, stride_y, stride_x, top, left, dilation_y, dilation_x;
  int32_t groups, padding;
  const model_value* weights;  // or the table of the codes
  const uint8_t* codes;
  const int32_t* biases;
  model_factor factor;
  model_range range;
} model_conv;

typedef struct {
  int32_t rows, inputs, outputs;
  const model_value* weights;
  const uint8_t* codes;
  const int32_t* biases;
  model_factor factor;
  model_range range;
} model_linear;

typedef struct {
  int32_t channels, in_height, in_width, out_height, out_width;
  int32_t kernel_height, kernel_width, stride_y, stride_x, top, left, dilation_y, dilation_x;
  int32_t padding, count_padding;  // for means: the integer of 0, and whether it counts
} model_pool;

typedef struct {
  int32_t count, lift;
  int32_t zero_a, zero_b;
  model_factor factor_a, factor_b, out;
  model_range range;
} model_add;

// One input of a concatenation: `outer` blocks, each behind `stride` results.
typedef struct {
  int32_t outer, block, stride, zero;
  model_factor factor;
  model_range range;
} model_copy;

static inline int32_t model_saturate(int64_t value) {
  if (value > INT32_MAX) return INT32_MAX;
  if (value < INT32_MIN) return INT32_MIN;
  return (int32_t)value;
}

static inline int32_t model_scale(int32_t sum, const model_factor* factor, int32_t channel) {
  const int32_t shift = factor->shifts[channel * factor->step];
  const int32_t left = shift < 0 ? -shift : 0;
#if MODEL_DYADIC
  const int64_t lifted = model_saturate((int64_t)sum * ((int64_t)1 << left));
  const int64_t product = lifted * factor->multipliers[channel * factor->step];
  const int64_t high = (product + ((int64_t)1 << 30)) >> 31;
  if (shift <= 0) return (int32_t)high;
  return (int32_t)((high + ((int64_t)1 << (shift - 1)) - (high < 0)) >> shift);
#else
  if (shift <= 0) return model_saturate((int64_t)sum * ((int64_t)1 << left));
#if MODEL_ROUNDING == 1
  sum += (int32_t)1 << (shift - 1);
#endif
  return sum >> shift;
#endif
}

static inline model_value model_clamp(int64_t value, const model_range* range) {
  value += range->zero;
  if (value < range->low) return (model_value)range->low;
  if (value > range->high) return (model_value)range->high;
  return (model_value)value;
}

static inline int32_t model_divide(int32_t sum, int32_t count) {
#if MODEL_ROUNDING == 2
  return sum > 0 ? (sum + count / 2) / count : (sum - count / 2) / count;
#else
#if MODEL_ROUNDING == 1
  const int64_t value = 2 * (int64_t)sum + count, by = 2 * (int64_t)count;
#else
  const int64_t value = sum, by = count;
#endif
  return (int32_t)(value / by - (value % by < 0));
#endif
}

// Weight `index`: an integer of its own, or code `index` of a stream of `bits` each, least significant bit first. A
// byte behind the last code is read.
static inline int32_t model_weight(const model_value* weights, const uint8_t* codes, int bits, size_t index) {
  if (bits == 0) return weights[index];
  const size_t bit = index * (size_t)bits;
  const unsigned pair = codes[bit / 8] | (unsigned)codes[bit / 8 + 1] << 8;
  return weights[(pair >> (bit % 8)) & ((1U << bits) - 1)];
}

// `bits` is a constant where this is called, so that compilers drop what it does not need.
static inline void model_run_linear(const model_linear* layer, int bits, const model_value* x, model_value* y) {
  for (int32_t row = 0; row < layer->rows; ++row, x += layer->inputs) {
    for (int32_t n = 0; n < layer->outputs; ++n) {
      const size_t start = (size_t)n * (size_t)layer->inputs;
      int32_t sum = layer->biases[n];
      for (int32_t k = 0; k < layer->inputs; ++k) {
        sum += model_weight(layer->weights, layer->codes, bits, start + (size_t)k) * (int32_t)x[k];
      }
      *y++ = model_clamp(model_scale(sum, &layer->factor, n), &layer->range);
    }
  }
}

// The first of `taps` reads, `step` apart from `start`, that is not below 0, and the one behind the last below `size`.
static inline void model_inside(int32_t start, int32_t step, int32_t taps, int32_t size, int32_t* first, int32_t* end) {
  *first = start < 0 ? (step - 1 - start) / step : 0;
  *end = start < size ? (size - start + step - 1) / step : 0;
  if (*first > taps) *first = taps;
  if (*end > taps) *end = taps;
  if (*end < *first) *end = *first;
}

// x (C, H, W), weights (O, C / groups, kernel height, kernel width), y (O, H, W).
static inline void model_run_conv(const model_conv* layer, int bits, const model_value* x, model_value* y) {
  const int32_t in_group = layer->in_channels / layer->groups, out_group = layer->out_channels / layer->groups;
  const int32_t height = layer->kernel_height, width = layer->kernel_width;
  const size_t plane = (size_t)layer->in_height * (size_t)layer->in_width;
  const size_t taps = (size_t)in_group * (size_t)height * (size_t)width;
  for (int32_t o = 0; o < layer->out_channels; ++o) {
    const model_value* group = x + (size_t)(o / out_group) * (size_t)in_group * plane;
    for (int32_t oy = 0; oy < layer->out_height; ++oy) {
      const int32_t y0 = oy * layer->stride_y - layer->top;
      int32_t top, bottom;
      model_inside(y0, layer->dilation_y, height, layer->in_height, &top, &bottom);
      for (int32_t ox = 0; ox < layer->out_width; ++ox) {
        const int32_t x0 = ox * layer->stride_x - layer->left;
        int32_t left, right;
        model_inside(x0, layer->dilation_x, width, layer->in_width, &left, &right);
        size_t index = (size_t)o * taps;
        int32_t sum = layer->biases[o];
        for (int32_t c = 0; c < in_group; ++c) {
          const model_value* channel = group + (size_t)c * plane;
          for (int32_t ky = 0; ky < height; ++ky) {
            const int inside = ky >= top && ky < bottom;
            const int32_t first = inside ? left : width, end = inside ? right : width;
            int32_t place = (y0 + ky * layer->dilation_y) * layer->in_width + x0 + first * layer->dilation_x;
            int32_t kx = 0;
            for (; kx < first; ++kx) {
              sum += model_weight(layer->weights, layer->codes, bits, index++) * layer->padding;
            }
            for (; kx < end; ++kx, place += layer->dilation_x) {
              sum += model_weight(layer->weights, layer->codes, bits, index++) * (int32_t)channel[place];
            }
            for (; kx < width; ++kx) {
              sum += model_weight(layer->weights, layer->codes, bits, index++) * layer->padding;
            }
          }
        }
        *y++ = model_clamp(model_scale(sum, &layer->factor, o), &layer->range);
      }
    }
  }
}

static inline void model_run_pool(const model_pool* layer, int mean, const model_value* x, model_value* y) {
  const int32_t area = layer->kernel_height * layer->kernel_width;
  for (int32_t c = 0; c < layer->channels; ++c, x += layer->in_height * layer->in_width) {
    for (int32_t oy = 0; oy < layer->out_height; ++oy) {
      for (int32_t ox = 0; ox < layer->out_width; ++ox) {
        int32_t sum = 0, most = INT32_MIN, count = 0;
        for (int32_t ky = 0; ky < layer->kernel_height; ++ky) {
          const int32_t iy = oy * layer->stride_y + ky * layer->dilation_y - layer->top;
          if (iy < 0 || iy >= layer->in_height) continue;
          for (int32_t kx = 0; kx < layer->kernel_width; ++kx) {
            const int32_t ix = ox * layer->stride_x + kx * layer->dilation_x - layer->left;
            if (ix < 0 || ix >= layer->in_width) continue;
            const int32_t value = x[iy * layer->in_width + ix];
            if (value > most) most = value;
            if (mean) sum += value;
            ++count;
          }
        }
        if (mean) {
          if (layer->count_padding) {
            sum += (area - count) * layer->padding;
            count = area;
          }
          most = model_divide(sum, count);
        }
        *y++ = (model_value)most;
      }
    }
  }
}

static inline void model_run_add(const model_add* layer, const model_value* a, const model_value* b, model_value* y) {
  const int32_t unit = (int32_t)1 << layer->lift;
  for (int32_t i = 0; i < layer->count; ++i) {
    const int32_t sum = model_scale((a[i] - layer->zero_a) * unit, &layer->factor_a, 0) +
                        model_scale((b[i] - layer->zero_b) * unit, &layer->factor_b, 0);
    y[i] = model_clamp(model_scale(sum, &layer->out, 0), &layer->range);
  }
}

static inline void model_run_copy(const model_copy* layer, const model_value* x, model_value* y) {
  for (int32_t i = 0; i < layer->outer; ++i, y += layer->stride) {
    for (int32_t j = 0; j < layer->block; ++j) {
      y[j] = model_clamp(model_scale(*x++ - layer->zero, &layer->factor, 0), &layer->range);
    }
  }
}

static inline void model_run_clamp(int32_t count, int32_t low, int32_t high, const model_value* x, model_value* y) {
  for (int32_t i = 0; i < count; ++i) {
    y[i] = (model_value)(x[i] < low ? low : x[i] > high ? high : x[i]);
  }
}

#endif
