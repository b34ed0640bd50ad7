"""A server of vLLM in processes of its own, started, stopped for a while and ended; requests to it, many at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECONDS_TO_START = 1800
LONGEST = 2048


def _intel_openmp() -> str | None:
    """The OpenMP runtime that vLLM asks to preload: it is installed with it."""
    found = sorted(Path(sys.prefix).glob("lib/libiomp5.so"))
    return str(found[0]) if found else None


class Server:
    """vLLM's server of a folder, ready for requests.

    Args:
        folder: of the model.
        log: the file for what it prints.
        eager: without torch.compile.
        dtype: of activations and of what is dense.
        environment: variables besides those of this process.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        *,
        eager: bool,
        dtype: str = "bfloat16",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # Not `vllm serve`: that asks for the version of a package of another name than that of the build for CPUs.
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1",
            "--port", str(self.port), "--served-model-name", "model", "--max-model-len", str(LONGEST), "--dtype", dtype,
            "--max-num-seqs", "64", "--no-enable-prefix-caching", *(["--enforce-eager"] if eager else []),
        ]  # fmt: skip
        preload = _intel_openmp()
        more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        if preload is not None:
            more["LD_PRELOAD"] = preload
        self.log = log
        started = time.perf_counter()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **more, **(environment or {})},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.end()
            raise
        self.seconds_to_start = time.perf_counter() - started

    def _wait(self) -> None:
        until = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < until:
            if self._process.poll() is not None:
                tail = self.log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"vLLM ended with {self._process.returncode}:\n{tail}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise RuntimeError(f"vLLM is not ready after {SECONDS_TO_START} s: see {self.log}")

    def pause(self) -> None:
        """Stops all of its processes where they are: they take no time then."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets them run again."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def end(self) -> None:
        """Ends it and the processes that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGCONT)
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def complete(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """The token ids that greedily follow those of a prompt, so many of them."""
        content: dict[str, Any] = {
            "model": "model", "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=SECONDS_TO_START) as answer:
            made = json.load(answer)["choices"][0]["token_ids"]
        if len(made) != tokens:
            raise RuntimeError(f"the answer must have {tokens} tokens, got {len(made)}")
        return list(made)

    def complete_all(
        self, prompts: Sequence[Sequence[int]], tokens: int
    ) -> tuple[list[list[int]], float]:
        """The answers to requests that are sent at once, and the seconds that all of them took."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            started = time.perf_counter()
            made = list(pool.map(lambda prompt: self.complete(prompt, tokens), prompts))
            return made, time.perf_counter() - started
