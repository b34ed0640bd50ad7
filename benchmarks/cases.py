"""What the comparison claims: our kernels, their rivals, and the ratio aimed at. Data; peers.py measures it."""

from __future__ import annotations

from dataclasses import dataclass

PEERS_4 = (
    "torch int4pack", "torchao int4", "bitsandbytes nf4", "onnxruntime b4", "OpenVINO u4", "ggml Q4_0",
    "ggml Q4_0 repacked", "ggml Q4_K", "ggml Q4_K repacked", "ggml IQ4_NL", "ggml IQ4_NL repacked",
)  # fmt: skip
PEERS_8 = ("torch int8pack", "onnxruntime b8", "OpenVINO u8", "ggml Q8_0")
PEERS_INT8 = (
    "onnxruntime b4", "onnxruntime b8", "OpenVINO u4", "OpenVINO u8", "torch _int_mm", "ggml Q4_0 repacked",
    "ggml Q4_K",
)  # fmt: skip
EVERY_M = (1, 2, 4, 8, 16, 32, 64, 128, 512)


@dataclass(frozen=True)
class Case:
    """One claim.

    Attributes:
        name: of the claim.
        ours: candidates, each on its own.
        rivals: the fastest of them counts.
        rows: numbers of rows of x.
        target: least time of the rival / our time, on one thread and on two.
        isa: caps our instruction set, in a process of its own.
    """

    name: str
    ours: tuple[str, ...]
    rivals: tuple[str, ...]
    rows: tuple[int, ...]
    target: tuple[float, float]
    isa: str | None = None


CASES = (
    Case("4 bits, exact, against the best peer", ("int4", "nf4", "kmeans4_pr"), PEERS_4, (1,), (1.5, 1.3)),
    Case("4 bits, share of the read ceiling", ("int4",), ("read int4", "prefetched read int4"), (1,), (0.85, 0.85)),
    Case("nf4, share of the read ceiling", ("nf4",), ("read nf4", "prefetched read nf4"), (1,), (0.85, 0.85)),
    Case("3 bits against our 4 bits", ("int3", "kmeans3"), ("int4",), (1,), (1.0, 1.2)),
    Case("3 bits against ggml Q3_K", ("int3", "kmeans3"), ("ggml Q3_K",), (1,), (2.0, 2.0)),
    Case("2 bits against our 4 bits", ("int2", "kmeans2"), ("int4",), (1,), (1.3, 1.6)),
    Case(
        "2 bits against the best peer", ("int2", "kmeans2"),
        ("onnxruntime b2", "ggml Q2_K", "ggml Q2_K repacked"), (1,), (1.3, 1.3),
    ),
    Case("ternary and binary against our 2 bits", ("ternary_trits", "binary"), ("int2",), (1,), (1.0, 1.0)),
    Case(
        "ternary and binary against the best of ggml", ("ternary_trits", "binary"),
        ("ggml TQ1_0", "ggml TQ2_0"), (1,), (1.5, 1.5),
    ),
    Case("8 bits against the best peer", ("int8", "kmeans8", "e4m3"), PEERS_8, (1,), (1.2, 1.2)),
    Case("4 bits, exact, against the best peer", ("int4", "nf4"), PEERS_4, (4, 8, 16), (1.3, 1.3)),
    Case(
        "exact bf16 against dense bf16",
        ("int4", "nf4", "kmeans4_pr", "int3", "int2", "ternary_trits", "binary", "int8", "e4m3"),
        ("torch dense bfloat16",), (128, 512), (1.0, 1.0),
    ),
    Case("int4 against dense bf16, every M", ("int4",), ("torch dense bfloat16",), EVERY_M, (1.0, 1.0)),
    Case("fp32 activations against dense fp32", ("int4 float32", "nf4 float32"), ("torch dense float32",),
         EVERY_M, (1.0, 1.0)),
    Case("fp16 activations against our bf16", ("int4 float16",), ("int4",), (1, 2, 4), (0.9, 0.9)),
    Case("fp16 activations against our bf16", ("int4 float16",), ("int4",), (128, 512), (0.5, 0.5)),
    Case("int8 activations against the best peer", ("int4_g128_a8", "nf4_a8t"), PEERS_INT8, (8,), (1.5, 1.5)),
    Case("int8 activations against the best peer", ("int4_g128_a8", "nf4_a8t", "int8_row_a8"), PEERS_INT8,
         (128, 512), (1.1, 1.1)),
    Case("nf4 against int4", ("nf4",), ("int4",), EVERY_M, (0.95, 0.95)),
    Case("3-bit codebook against integers", ("kmeans3",), ("int3",), (1, 128), (0.95, 0.95)),
    Case("int8 activations, nf4 against int4", ("nf4_a8t",), ("int4_g128_a8",), (8, 128, 512), (0.95, 0.95)),
    Case(
        "AVX2, 4 bits, against libggml", ("int4", "nf4", "int4_g128_a8"),
        ("libggml Q4_0", "libggml Q4_0 repacked", "libggml Q4_1", "libggml Q4_K", "libggml IQ4_NL"),
        (1,), (1.2, 1.2), "avx2",
    ),
)  # fmt: skip

# Tokens per second of ours over those of llama.cpp's best type, aimed at on two threads.
MODEL_TARGETS = {
    "SmolLM2-135M": {"prefill": 2.0, "decode": 1.2},
    "Llama of 1.2 B": {"decode": 1.3},
}
