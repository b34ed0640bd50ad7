"""Tiny models of packed weights in vLLM's engine give the greedy tokens of transformers: where vLLM is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm")

TOKENS = 12
PROMPTS = [[3, 7, 11, 2], list(range(40, 60)), [90]]
RULES = {"embed_tokens|lm_head": "int8_g32", "k_proj": None, "up_proj": "nf4_g32", ".*": "int4_g32"}
# A process of its own: the engine leaves threads and settings of torch behind.
RUN = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, world, dtype, prompts, tokens = json.loads(sys.argv[1])
    model = LLM(
        folder, dtype=dtype, max_model_len=64, enforce_eager=True, max_num_seqs=4, skip_tokenizer_init=True,
        tensor_parallel_size=world,
    )
    settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    made = model.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
    print("MADE", json.dumps([list(m.outputs[0].token_ids) for m in made]))
"""


def model(tied: bool, rules: Any = RULES) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=130, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    made = transformers.Qwen2ForCausalLM(config).eval()
    lowbit.quantize_model(made, rules, skip=())
    return made


def served(folder: Path, script: Path, world: int, dtype: str = "float32") -> list[list[int]]:
    script.write_text(RUN)
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    if world > 1:
        cpus = sorted(os.sched_getaffinity(0))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cpu) for cpu in cpus[:world])
    given = json.dumps([str(folder), world, dtype, PROMPTS, TOKENS])
    ended = subprocess.run(
        [sys.executable, str(script), given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith("MADE ")]
    assert lines, ended.stdout[-3000:] + ended.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("MADE "))


@pytest.mark.parametrize(
    ("tied", "world", "pretrained"), [(True, 1, True), (False, 2, False)], ids=("tied", "two")
)
def test_greedy_tokens(tmp_path: Path, tied: bool, world: int, pretrained: bool) -> None:
    """Of a folder of save_pretrained with a tied head, and on two processes of one of lowbit.save."""
    if world > len(os.sched_getaffinity(0)):
        pytest.skip(f"needs {world} CPUs")
    made, folder = model(tied), tmp_path / "model"
    if pretrained:
        made.save_pretrained(folder)
    else:
        made.config.save_pretrained(folder)
        lowbit.save(made, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "quantization_config": {"quant_method": "lowbit"},
            "architectures": ["Qwen2ForCausalLM"],
        }
        (folder / "config.json").write_text(json.dumps(config))
    want = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = made.generate(
            ids, attention_mask=mask, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )
        want.append(out[0, len(prompt) :].tolist())
    assert served(folder, tmp_path / "run.py", world) == want


def test_nothing_dense_in_bf16(tmp_path: Path) -> None:
    """No dense product asks the system for AMX then, which vLLM's attention needs."""
    model(True, {"embed_tokens|lm_head": "int8_g32", ".*": "int4_g32"}).save_pretrained(
        tmp_path / "model"
    )
    made = served(tmp_path / "model", tmp_path / "run.py", 1, "bfloat16")
    assert [len(m) for m in made] == [TOKENS] * len(PROMPTS)
