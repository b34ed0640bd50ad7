"""The (N, K) shapes of the linears that benchmarks run over: out features, in features."""

from __future__ import annotations

SMOLLM2_135M = ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576))
LLAMA_3_2_1B = ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192))
LLAMA_3_8B = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
QWEN_2_5_7B = ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944))
ODD = ((10944, 4096), (4096, 7392))

MODELS = {
    "SmolLM2-135M": SMOLLM2_135M,
    "Llama-3.2-1B": LLAMA_3_2_1B,
    "Llama-3-8B": LLAMA_3_8B,
    "Qwen2.5-7B": QWEN_2_5_7B,
    "odd": ODD,
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
THREADS = (1, 2)
# What the comparison with peers takes: one shape of each model, and the odd K.
COMPARED = ((4096, 4096), (14336, 4096), (2048, 8192), (1536, 576), (4096, 7392))
