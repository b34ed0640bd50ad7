"""Checkpoints that another program quantized, or lowbit itself: recognized, so that none of them is
taken for a dense one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowbit.io.safetensors_file import SafetensorsFile, tensor_files

CONFIG_NAME = "config.json"
# Written by the programs that quantize, beside the weights.
_QUANTIZER_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
# Those that say all that a reader needs, of ModelOpt in a part of this name.
METHOD_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_PART = "quantization"
_QMAP = "quanto_qmap.json"
OWN_FILES = (*METHOD_FILES, _QMAP)
CONFIG_KEYS = ("quantization_config", "compression_config")
# The first that a tensor's name ends in says who made it.
_SUFFIXES = (
    (r"\.g_idx", "GPTQ"),
    (r"\.qweight", "GPTQ or AWQ"),
    (r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\..*)", "bitsandbytes, 4 bits"),
    (r"\.(SCB|weight_format)", "bitsandbytes, 8 bits"),
    (r"\.weight_packed", "compressed-tensors"),
    (r"\.weight_scale_inv", "FP8 with a scale per block"),
    (r"_proj_blocks", "MXFP4"),
    (r"\.W_q", "HQQ"),
    (r"\.weight\._data|\.weight_qtype", "quanto"),
    (r"\.weight_qdata|\.weight:_?qdata", "torchao"),
    (r"\.Qidxs", "QuIP#"),
    (r"\.q_weight|\.trellis", "EXL2 or EXL3"),
)
_SCALE = re.compile(r"(.*\.weight)_(scale|scale_2|zero_point)", re.DOTALL)


def refuse_quantized(source: Path) -> None:
    """Raises ValueError if the checkpoint at `source`, a file or a folder, is quantized already."""
    pickled = source.is_dir() and not any(source.glob("*.safetensors"))
    readers = [] if pickled else [SafetensorsFile(file) for file in tensor_files(source)]
    for reader in readers:
        if "lowbit" in reader.metadata:
            raise ValueError(
                f"{reader.path}: is a lowbit checkpoint already; give the dense checkpoint that it "
                "was made from"
            )
    if found := _by_files(source) or _by_tensors(readers):
        raise ValueError(
            f"{source}: is quantized already ({found}): give the dense checkpoint that it was made from, or "
            "let lowbit quantize --quantized keep or requantize it; lowbit.load_model reads a folder of it"
        )


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """What the program that quantized a folder of transformers wrote of it: `quantization_config` (or
    `compression_config`) of config.json, at its top or in a part, else GPTQ's, AWQ's or ModelOpt's own file, with
    "quant_method".

    None if there is no config.json, or nothing says that the folder is quantized.

    Raises:
        ValueError: a file is damaged.
    """
    file = folder / CONFIG_NAME
    if not folder.is_dir() or not file.is_file():
        return None
    content = read_json(file)
    parts = [content, *(part for part in content.values() if isinstance(part, dict))]
    for key in CONFIG_KEYS:
        for part in parts:
            if how := part.get(key):
                if not isinstance(how, dict):
                    raise ValueError(f"{file}: {key} must be an object, got {how!r:.100}")
                method = how.get("quant_method", "")
                if not isinstance(method, str):
                    raise ValueError(f"{file}: quant_method must be a name, got {method!r:.100}")
                default = {"quant_method": "compressed-tensors"} if key == CONFIG_KEYS[1] else {}
                return {**default, **how}
    if isinstance(content.get("anyprec"), dict):
        return {"quant_method": "anyprec", **content["anyprec"]}
    if (own := folder / _QMAP).is_file():
        return {"quant_method": "quanto", "map": read_json(own)}
    for name, method in METHOD_FILES.items():
        if (own := folder / name).is_file():
            content = read_json(own)
            inner = content.get(_PART) if method == "modelopt" else content
            if not isinstance(inner, dict):
                raise ValueError(f"{own}: {_PART} must be an object, got {inner!r:.100}")
            return {"quant_method": method, **inner}
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
        ValueError: it is none; the message names the file.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not a JSON file: {e}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {content!r:.100}")
    return content


def _by_files(source: Path) -> str | None:
    if not source.is_dir():
        return None
    if (config := source / CONFIG_NAME).is_file():
        content = read_json(config)
        parts = [content, *(part for part in content.values() if isinstance(part, dict))]
        for key in CONFIG_KEYS:
            for part in parts:
                if how := part.get(key):
                    method = how.get("quant_method") if isinstance(how, dict) else how
                    return f"{key} of {CONFIG_NAME}: {method!r:.100}"
    for name, program in _QUANTIZER_FILES.items():
        if (source / name).is_file():
            return f"{program}, by its {name}"
    return None


def _by_tensors(readers: Iterable[SafetensorsFile]) -> str | None:
    specs = {name: spec for reader in readers for name, spec in reader.specs.items()}
    for suffix, program in _SUFFIXES:
        pattern = re.compile(rf".*(?:{suffix})", re.DOTALL)
        for name in specs:
            if pattern.fullmatch(name):
                return f"{program}, by its tensor {name!r:.200}"
    for name in specs:
        if (match := _SCALE.fullmatch(name)) and match[1] in specs:
            dtype = specs[match[1]][1]
            if dtype.itemsize == 1:
                return f"{str(dtype).removeprefix('torch.')}, by its tensor {name!r:.200}"
    return None
