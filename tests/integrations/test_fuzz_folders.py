"""Folders of transformers and calibration files damaged at random: the model or tokens, or a ValueError
that names the folder; and no code of a folder runs.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import lowbit  # noqa: E402
from lowbit.integrations import pretrained  # noqa: E402

# Examples are made from the seed of the test's name, so that a failure is found again.
fuzz = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
KINDS = ("dense", "quantized")
LOADERS = {"dense": pretrained.load_dense, "quantized": pretrained.load_folder}


@functools.cache
def good(kind: str) -> Path:
    """A folder that loads. The system's folder for temporary files is not cleaned by tests."""
    folder = Path(tempfile.mkdtemp()) / kind
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    if kind == "quantized":
        lowbit.quantize_model(model, "int4_g8", progress=False)
        lowbit.save(model, folder)
    return folder


def outcome(read: Callable[[], Any], name: str) -> Any:
    """What `read` returns, or None after a documented error that names `name`."""
    try:
        return read()
    except (ValueError, FileNotFoundError) as e:
        message = str(e)
    assert name in message
    assert len(message) < 20_000
    return None


def damaged(kind: str, change: Callable[[Path], None]) -> Any:
    """What becomes of a copy of the good folder after `change`."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "m"
        shutil.copytree(good(kind), folder)
        change(folder)
        return outcome(lambda: LOADERS[kind](folder), str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_the_undamaged_folder_loads(kind: str):
    model = damaged(kind, lambda folder: None)
    assert model(torch.arange(4)[None]).logits.shape == (1, 4, 32)


KEYS = sorted(json.loads((good("dense") / "config.json").read_text()))
values = st.sampled_from(
    [None, True, -1, 0, 1, 3.5, 1e300, float("nan"), 2**31, 2**63, "", "x", "bfloat16", "int4", [], {}, [3.5], ["a"]]
) | st.recursive(st.none() | st.integers(-5, 5) | st.text(max_size=4), st.lists, max_leaves=4)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(changes=st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=2))
def test_wrong_values_of_the_configuration(kind: str, changes: dict):
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    damaged(kind, change)


edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)
FILES = ("config.json", "model.safetensors", "generation_config.json")


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(file=st.sampled_from(FILES), edits=edits, cut=st.none() | st.floats(0, 1))
def test_wrong_bytes(kind: str, file: str, edits: list, cut: float | None):
    def change(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        # Of the weights the header: wrong values are no damage.
        reach = len(data) if file.endswith(".json") else 8 + int.from_bytes(data[:8], "little")
        for place, patch in edits:
            start = int(reach * place)
            data[start : start + len(patch)] = patch
        (folder / file).write_bytes(data[: None if cut is None else int(len(data) * cut)])

    damaged(kind, change)


@pytest.mark.parametrize(
    "name", ["pipeline", "AutoModel", "PreTrainedModel", "LlamaConfig", "Nothing", "os", 3.5, None, ["a"]]
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_the_class_must_be_a_model(kind: str, name: object, tmp_path: Path):
    """Not whatever attribute of transformers has that name."""

    folder = tmp_path / "m"
    shutil.copytree(good(kind), folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "architectures": [name]}))
    with pytest.raises(ValueError, match=r"config\.json: architectures"):
        LOADERS[kind](folder)


@pytest.mark.parametrize("kind", KINDS)
def test_more_layers_than_tensors(kind: str):
    """Found before a hundred million layers are made."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 10**8}))

    assert damaged(kind, change) is None


@pytest.mark.parametrize("where", ["config", "tokenizer", "generate"])
def test_no_code_of_a_folder_runs_or_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    folder = tmp_path / "m"
    shutil.copytree(good("dense"), folder)
    # A bare `assert False` of the code would be turned into a ValueError; a file is a proof.
    proof = tmp_path / "ran"
    code = f"open({str(proof)!r}, 'w').close()\n"
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code + "class Evil: pass\ndef generate(*a, **k): pass\n")
    content = json.loads((folder / "config.json").read_text())
    if where == "config":
        content |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
        (folder / "config.json").write_text(json.dumps(content))
    elif where == "tokenizer":
        tokenizer = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a question was asked"))
    (tmp_path / "t.txt").write_text("a b c")
    if where == "config":
        for read in LOADERS.values():
            assert outcome(lambda read=read: read(folder), str(folder)) is None
    else:
        pretrained.load_dense(folder)
    tokens = lambda: pretrained.calibration_tokens(tmp_path / "t.txt", folder, length=8)  # noqa: E731
    assert outcome(tokens, str(folder)) is None
    assert not proof.exists()


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


NPY = npy(np.arange(40, dtype=np.int64).reshape(2, 20) % 32)
HEADER = len(NPY) - 320
headers = st.sampled_from(
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 1000000000000), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 20), }",
        "{'descr': '<i8', 'fortran_order': 3, 'shape': (2, 20), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (2,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': 3, }",
        "((((((((((",
        "'''",
        "{'descr': {}}",
    ]
)


def tokens_of(data: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as parent:
        path = Path(parent) / f"t{suffix}"
        path.write_bytes(data)
        rows = outcome(
            lambda: pretrained.calibration_tokens(path, good("dense"), length=8), str(path)
        )
        for row in rows or ():
            assert row.dtype == torch.int64
            assert row.shape[0] == 1
            assert 0 <= int(row.min()) <= int(row.max()) < 32


@fuzz
@given(header=headers)
def test_hostile_npy_headers(header: str):
    """A size that memory does not have, objects, and what is no Python."""
    text = header.encode().ljust(117) + b"\n"
    tokens_of(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + NPY[HEADER:], ".npy")


@settings(fuzz, max_examples=300)
@given(
    edits=edits, suffix=st.sampled_from([".npy", ".safetensors"]), cut=st.none() | st.floats(0, 1)
)
def test_wrong_bytes_of_tokens(edits: list, suffix: str, cut: float | None):
    from safetensors.torch import save

    whole = NPY if suffix == ".npy" else save({"t": torch.arange(20)})
    data = bytearray(whole)
    for place, patch in edits:
        start = int(HEADER * place)
        data[start : start + len(patch)] = patch
    tokens_of(bytes(data[: None if cut is None else int(len(data) * cut)]), suffix)


def test_an_archive_is_no_array():
    data = io.BytesIO()
    np.savez(data, a=np.arange(3))
    tokens_of(data.getvalue(), ".npy")


def test_a_model_without_a_vocabulary(tmp_path: Path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.save_pretrained(tmp_path / "vit")
    np.save(tmp_path / "t.npy", np.arange(4))
    with pytest.raises(ValueError, match="calibration is for models of tokens"):
        pretrained.calibration_tokens(tmp_path / "t.npy", tmp_path / "vit")
