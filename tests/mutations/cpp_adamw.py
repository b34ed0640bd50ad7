"""AdamW with FP8 states."""

from __future__ import annotations

from mutations import cpp

MUTANTS = [
    *cpp("cpu/optim/fp8_adamw-inl.h", "test_fp8_adamw", "scalar")(
        ("shift_left<23>(add_i(bits_of(shifted), set1_i(127)))", "shift_left<23>(add_i(bits_of(shifted), set1_i(126)))"),
        ("p = fma(p, f, set1(0.240226507f));", "p = fma(p, f, set1(0.340226507f));"),
        ("div(x2.f, add(x2.f, set1(2.0f)))", "div(x2.f, add(x2.f, set1(1.0f)))"),
        ("p = fma(p, x2.f, set1(-0.721170902f));", "p = fma(p, x2.f, set1(-0.701170902f));"),
        ("kLog2Max = T == Float8::kE4m3 ? 8.807354922f", "kLog2Max = T == Float8::kE4m3 ? 8.907354922f"),
        ("return shift_right<f::kMantissa>(max_i(exponent_field(code), set1_i(kOne)));", "return shift_right<f::kMantissa>(exponent_field(code));"),
        ("const F top = max_or_nan(set1(1 - f::kBias), e);", "const F top = max_or_nan(set1(-f::kBias), e);"),
        ("set1(kOne * (f::kBias - 1))));", "set1(kOne * f::kBias)));"),
        ("const F inverse = div(set1(1.0f), set1(terms[groups])), center", "const F inverse = set1(terms[groups]), center"),
        ("store(entries + 16 + i, mul(exp2_of(mul(exponent, inverse)), center));", "store(entries + 16 + i, exp2_of(mul(exponent, inverse)));"),
        ("select_bits(set1_i(INT32_MIN), shift_left<24>(code), bits_of(value))", "select_bits(set1_i(INT32_MIN), shift_left<23>(code), bits_of(value))"),
        ("return mul(decode<T>(code), scale);", "return decode<T>(code);"),
        ("most = max_i(most, magnitude);", "most = magnitude;"),
        ("least = min_u(least, add_i(magnitude", "least = min_i(least, add_i(magnitude"),
        ("} else if (most >= 0x7F800000u) {", "} else if (most > 0x7FFFFFFFu) {"),
        ("mul(root(set1(mx)), root(set1(mn)))", "mul(root(set1(mx)), root(set1(mx)))"),
        ("scale = mx / Fp8<T>::kMax;", "scale = mx / 448.0f;"),
        ("if (writer.empty) {\n    __builtin_memset(codes, 0, count);", "if (writer.empty) {"),
        ("__builtin_memcpy(codes + i, bytes, count - i);", "__builtin_memcpy(codes + i, bytes, count - i - 1);"),
        ("mul(mul(rest2, grad), grad)", "mul(rest2, grad)"),
        ("fma(root(v), correction, eps)", "fma(root(v), correction, zero())"),
        ("step_size = set1(-z.step_size)", "step_size = set1(z.step_size)"),
        ("mul(param, decay)", "param"),
        ("v_range.add_values(v);", "v_range.add_values(m);"),
        ("whole ? kVecLanes : here);", "here - 1);"),
        ("step_groups<kE5m2, kE5m2>(z, begin, end) : step_groups<kE5m2, kE4m3>", "step_groups<kE5m2, kE4m3>(z, begin, end) : step_groups<kE5m2, kE4m3>"),
    ),
]  # fmt: skip
