"""The compiled decoder: attention, row-wise functions, what threads share out."""

from __future__ import annotations

from mutations import cpp

TEST = "tests/decoder/test_decoder.py"
BATCH = "tests/decoder/test_batch.py"
CACHE = "tests/decoder/test_cache.py"
ARCHITECTURES = "tests/decoder/test_architectures.py"
MUTANTS = [
    *cpp("decoder/attention-inl.h", TEST, "scalar")(
        ("limit = a.first_limit + row / a.group;", "limit = a.first_limit + row / a.group - 1;"),
        ("a.sum[row] = a.sum[row] * rescale + sum_lanes(total);", "a.sum[row] = a.sum[row] + sum_lanes(total);"),
        ("if (clears) next[d * per] = 0;", ""),
        ("fill_unseen(-__builtin_inff());", ""),
        ("total += parts[i].sum * exp(parts[i].max - most);", "total += parts[i].sum;"),
        ("(seen + 1) / 2 - pair, w", "seen / 2 - pair, w"),
    ),
    *cpp("decoder/worker.cpp", CACHE)(
        ("out[i] = is_key ? out[i] / balance[i] : out[i] * balance[i];", "out[i] = out[i] * balance[i];"),
        ("kv_head = is_key ? head - c.heads : head / (c.heads / c.kv_heads);", "kv_head = is_key ? head - c.heads : 0;"),
    ),
    *cpp("decoder/attention-inl.h", ARCHITECTURES, "scalar")(
        ("first = limit - a.window - b0;", "first = limit - a.window - 1 - b0;"),
        ("if (a.cap != 0.0f) scaled = mul(tanh(div(scaled, set1(a.cap))), set1(a.cap));", ""),
        ("unseen = first < unseen ? first : unseen;", "unseen = first;"),
    ),
    *cpp("decoder/attention-inl.h", CACHE, "scalar")(
        ("if (last && position % 2 == 0) c.value_scales[position + 1] = 0.0f;", ""),
        ("max_or_nan(v, sub(zero(), v))", "v"),
        ("const float* scales = c.key_scales + d / group * c.length + b0 + at;", "const float* scales = c.key_scales + b0 + at;"),
        ("store(p[r] + i, mul(load(p[r] + i), load(c.value_scales + b0 + i)));", ""),
    ),
    *cpp("decoder/attention-inl.h", "test_decoder", "scalar")(
        ("max_lane(most) + sum_lanes(poison)", "max_lane(most)"),
    ),
    *cpp("decoder/rows-inl.h", TEST, "scalar")(
        ("__builtin_sqrtf(sum_lanes(squares) / static_cast<float>(n) + norm.eps)", "__builtin_sqrtf(sum_lanes(squares) / static_cast<float>(n))"),
        ("__builtin_memcpy(h.scratch + half, h.out, half * sizeof(float));", "__builtin_memcpy(h.scratch + half, h.out + half, half * sizeof(float));"),
        ("if (found > best) {", "if (found >= best) {"),
    ),
    *cpp("decoder/rows-inl.h", ARCHITECTURES, "scalar")(
        ("mul(norm.late ? v : round_t<kType>(v), weight)", "mul(round_t<kType>(v), weight)"),
        ("__builtin_memset(static_cast<char*>(a.out) + a.n * size_of(kType), 0, left * size_of(kType));", ""),
        ("if (a.y_scale != 1.0f) addend = round_t<kType>(mul(addend, set1(a.y_scale)));", ""),
        ("for (int64_t i = h.rotary; i % kVecLanes; ++i) h.scratch[i] = 0.0f;", ""),
        ("if (divisor != 1.0f) v = round_t<kType>(div(v, set1(divisor)));", ""),
        ("activate(activation, lanes, kVecLanes);", ""),
        ("add(e, set1(2.0f))", "add(e, set1(1.0f))"),
    ),
    *cpp("decoder/worker.h", TEST)(
        ("begin -= part.tasks;", ""),
    ),
    *cpp("decoder/worker.cpp", TEST)(
        ("const int64_t first = head / group * blocks;", "const int64_t first = head * blocks;"),
    ),
    *cpp("decoder/rows.cpp", TEST)(
        ("place.position + i, my.q + r * d.head_padded_);", "place.position, my.q + r * d.head_padded_);"),
    ),
    *cpp("decoder/worker.h", ARCHITECTURES)(
        ("position + 1 - window, 0) / kKeyBlock", "position + 2 - window, 0) / kKeyBlock"),
    ),
    *cpp("decoder/rows.cpp", ARCHITECTURES)(
        ("a.begin = Seen(window, place.position).first * kKeyBlock;", "a.begin = Seen(window, place.position + rows - 1).first * kKeyBlock;"),
    ),
    *cpp("decoder/worker.cpp", ARCHITECTURES)(
        ("store_rows(layer, place, logits ? last : rows);", "store_rows(layer, place, last);"),
        ("h.weight = head < c.heads ? l.q_norm : l.k_norm;", "h.weight = l.q_norm;"),
        ("if (count == 1) run_tasks(*parts[0].kernel, parts[0].launch, blocks + b, blocks + e);", ""),
        ("add_norm(d.one_.y, norm_before(layers), d.model_.norm);", "add_norm(d.one_.y, nullptr, d.model_.norm);"),
        ("if (d.config_.embedding_scale == 1.0f) return;", "return;"),
    ),
    *cpp("decoder/rows.cpp", BATCH)(
        ("store_key(layer, h, d.row(many.qkv, i, width), places[i], true);", "store_key(layer, h, d.row(many.qkv, i, width), {0, places[i].position}, true);"),
        ("d.ops_->cap_logits(c.dtype, d.logits(i), c.logit_divisor, c.logit_cap, 0, c.vocab);", ""),
        ("norm_before(d.model_.layers.size())", "nullptr"),
    ),
    *cpp("decoder/decoder.cpp", TEST)(
        ("!other.kernel || other.x_scale != part.x_scale", "!other.kernel"),
    ),
    *cpp("decoder/decoder.cpp", ARCHITECTURES)(
        ("c.values = values_.data() + row * static_cast<size_t>(head_padded_)", "c.values = values_.data() + row * static_cast<size_t>(config_.head_dim)"),
        ("place.position += rows;", ""),
    ),
    *cpp("decoder/decoder.cpp", BATCH)(
        ("static_cast<size_t>(sequence) * model_.layers.size() + layer;", "layer;"),
    ),
]  # fmt: skip
