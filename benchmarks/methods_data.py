"""What methods.py calibrates and tests on: Python's docstrings and sample images of installed packages."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Photographs, by the folder that holds them.
TEST_IMAGES = {
    "skimage/data": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png"),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
    "matplotlib/mpl-data/sample_data": ("grace_hopper.jpg",),
}
CALIBRATION_IMAGES = {
    "skimage/data": (
        "motorcycle_left.png", "coins.png", "brick.png", "grass.png", "gravel.png", "moon.png",
        "hubble_deep_field.jpg", "clock_motion.png",
    ),
}  # fmt: skip
SIDE = 224
# What EfficientNet-lite was trained with.
_MEAN, _STD = 127, 128


def docstrings(half: int) -> list[str]:
    """The docstrings of every second module beside `json`, from module `half` (0 or 1) on, in a fixed
    random order.
    """
    folder = Path(json.__file__).parents[1]
    found: dict[str, None] = {}
    for path in sorted(folder.glob("*.py"))[half::2]:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Module)) and (
                text := ast.get_docstring(node)
            ):
                found[text] = None
    texts = list(found)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return [texts[i] for i in order]


def crops(images: dict[str, tuple[str, ...]], each: int) -> Tensor:
    """`each` random squares of every image, half of them mirrored: (B, 3, SIDE, SIDE) normalized."""
    rng = np.random.default_rng(0)
    made = []
    for folder, names in images.items():
        for name in names:
            image = Image.open(_package(folder.partition("/")[0]) / folder / name).convert("RGB")
            for i in range(each):
                side = int(rng.uniform(0.4, 1) * min(image.size))
                left, top = (int(rng.integers(0, size - side + 1)) for size in image.size)
                box = (left, top, left + side, top + side)
                square = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)
                pixels = np.asarray(square)[:, :: 1 if i % 2 else -1]
                made.append(torch.tensor(pixels.copy()))
    return (torch.stack(made).permute(0, 3, 1, 2).float() - _MEAN) / _STD


def _package(name: str) -> Path:
    """The folder that an installed package lies in; the package is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {name} is not installed: see `make peers`")
    return Path(spec.submodule_search_locations[0]).parent
