"""`lowbit serve`: a client of OpenAI's API gets the tokens that transformers' generate makes."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from test_cli import fail, run

import lowbit
from gguf_files import write_llama
from lowbit.integrations.load import load_tokenizer

for package in ("fastapi", "uvicorn", "openai"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

SECONDS = 120
MESSAGES = [{"role": "user", "content": "the path"}]


@pytest.fixture
def folder(tmp_path: Path, capsys: Any) -> Path:
    run(capsys, "quantize", write_llama(tmp_path / "a.gguf"), tmp_path / "m", "--quantized", "keep")
    return tmp_path / "m"


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lowbit.cli", "serve", str(folder), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [*command, "--device", "cpu"], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        url = f"http://localhost:{port}"
        try:
            _wait(url, process)
            yield url
        finally:
            process.kill()


def _wait(url: str, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(process.communicate()[1][-3000:])
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"no answer from {url} in {SECONDS} s")


def test_a_client_gets_the_tokens_of_generate(folder: Path, server: str) -> None:
    asked = {"model": str(folder), "messages": MESSAGES, "max_tokens": 12, "stream": False}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        answer = json.load(response)
    model, tokenizer = lowbit.load_model(folder), load_tokenizer(folder)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    made = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(made, skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]


def test_bad_input(tmp_path: Path, folder: Path, capsys: Any, monkeypatch: Any) -> None:
    assert "lowbit quantize" in fail(capsys, "serve", tmp_path / "a.gguf")
    assert "none" in fail(capsys, "serve", tmp_path / "none")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    message = fail(capsys, "serve", folder)
    assert "uvicorn is not installed" in message
    assert "'transformers[serving]'" in message
