"""The layers of the package: imports go one way, files are small, what is public is documented."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
from pathlib import Path

import pytest

import lowbit

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "lowbit"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500
MAX_CONTRACT_LINES = 8
# Where the layout of files is documented to the bit.
LONG_CONTRACTS = {"python/lowbit/packing.py": 12}

# A module may import modules of the lines above its own, and those of its own package.
LAYERS = (
    ("files", "modes", "strides", "tables", "text", "transforms"),
    ("formats", "_C", "_cuda"),
    ("codebooks", "forking", "packing"),
    ("weights",),
    ("reference",),
    ("layouts",),
    ("backends", "checks", "gradients"),
    ("fused", "weight_ops"),
    ("outliers",),
    ("autograd",),
    ("ops",),
    ("fp8",),
    ("binary", "int8"),
    ("methods", "optim"),
    ("nn",),
    ("decoder", "io"),
    ("ptq",),
    ("qat", "integrations"),
    ("cli",),
    ("quantize",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Methods that call a function of a higher layer by its public name, when they are called.
UPWARD = {("weights", "ops")}
# Third-party packages that only these modules may import; torch may be imported anywhere but in
# `formats`, numpy anywhere.
RESTRICTED = {
    "accelerate": {"integrations", "nn"},
    "gguf": {"io", "integrations"},
    "matplotlib": {"ptq"},
    "rich": {"cli", "ptq"},
    "safetensors": {"io"},
    "scipy": {"codebooks"},
    "sklearn": {"qat"},
    "tomli": {"ptq"},
    "tomllib": {"ptq"},
    "tqdm": {"ptq"},
    "triton": set(),
    "transformers": {"cli", "decoder", "integrations"},
    "typer": {"cli"},
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def lowbit_imports(tree: ast.Module) -> set[str]:
    """The layers of lowbit that a file reaches, at any depth of nesting."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = node.module.split(".")
            if parts == ["lowbit"]:
                found |= {alias.name for alias in node.names}
            elif parts[0] == "lowbit":
                found.add(parts[1])
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {parts[1] for parts in names if parts[0] == "lowbit" and len(parts) > 1}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lowbit":
            found.add(node.attr)
    return found


def third_party_imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


MODULES = [path for path in FILES if path != PACKAGE / "__init__.py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    layer = layer_of(path)
    assert layer in LEVEL, f"{layer} has no place in LAYERS"
    imports = lowbit_imports(parse(path))
    assert imports <= LEVEL.keys(), f"{imports - LEVEL.keys()} are no modules of lowbit"
    upward = {name for name in imports if name != layer and LEVEL[name] >= LEVEL[layer]}
    assert {(layer, name) for name in upward} <= UPWARD


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_third_party_imports(path: Path) -> None:
    imports, layer = third_party_imports(parse(path)), layer_of(path)
    misplaced = {name for name in imports & RESTRICTED.keys() if layer not in RESTRICTED[name]}
    assert not misplaced
    assert layer != "formats" or "torch" not in imports


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=name_of)
def test_triton_kernels_stand_alone(path: Path) -> None:
    """They import Triton, torch and each other, and are imported by the backend alone, when they are needed."""
    tree = parse(path)
    assert third_party_imports(tree) - {"codecs", "configs", "fp8_quantize", "linear"} <= {
        "__future__",
        "dataclasses",
        "torch",
        "triton",
    }
    assert not lowbit_imports(tree)


LAYOUT_NAMES = {"CANONICAL", "N16", "K16", "M16", "canonical", "n16", "k16", "m16"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_layout_is_asked_its_name(path: Path) -> None:
    """What differs between layouts is a method of their class; which one a device reads, the backends know."""
    if layer_of(path) in ("layouts", "backends"):
        return
    for compare in ast.walk(parse(path)):
        if isinstance(compare, ast.Compare):
            parts = [vars(part) for part in ast.walk(compare)]
            words = {part.get(key) for part in parts for key in ("id", "attr", "value")}
            assert not words & LAYOUT_NAMES, ast.unparse(compare)


def test_exceptions_and_layers_are_in_use() -> None:
    present = {layer_of(path) for path in MODULES} | {"_C", "_cuda"}
    assert present == LEVEL.keys()
    used = {(layer_of(path), name) for path in MODULES for name in lowbit_imports(parse(path))}
    assert used >= UPWARD


def sources() -> list[Path]:
    folders = ("python", "tests", "csrc", "kernels", "benchmarks")
    suffixes = {".py", ".pyi", ".h", ".cpp", ".cuh", ".cu"}
    return sorted(p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes)


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_files_are_small_and_open_with_their_contract(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    if path.suffix == ".py":
        contract = ast.get_docstring(ast.parse(text))
        assert contract, "no docstring"
        most = LONG_CONTRACTS.get(name_of(path), MAX_CONTRACT_LINES)
        assert len(contract.splitlines()) <= most
    elif path.suffix in (".h", ".cuh"):
        assert text.startswith("//"), "the first line must say what the file is"


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions, classes and methods without a docstring."""
    names = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if child.name.startswith("_"):
                    continue
                if not ast.get_docstring(child):
                    names.append(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{child.name}.")

    visit(tree, "")
    return names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_public_is_documented(path: Path) -> None:
    assert undocumented(parse(path)) == []


def test_public_names() -> None:
    """Every public name resolves, and stays what it is when a module of the same name is imported."""
    with pytest.raises(ImportError, match=r"from lowbit\.ptq"):
        importlib.import_module("lowbit.quantize")
    assert set(dir(lowbit)) >= set(lowbit.__all__)
    for name in set(lowbit.__all__) - {"__version__"}:
        assert getattr(lowbit, name) is not None, name
    for name in ("formats", "kernels", "quantize", "quantize_model", "linear", "save", "load"):
        assert callable(getattr(lowbit, name)), name
    assert isinstance(lowbit.formats()["nf4"], lowbit.Format)
    assert {row["op"] for row in lowbit.kernels()} >= {"linear", "dequantize"}
    with pytest.raises(AttributeError, match="module 'lowbit' has no attribute 'nothing'"):
        _ = lowbit.nothing


def test_version() -> None:
    try:
        installed = importlib.metadata.version("lowbit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lowbit is imported from its source tree, not installed")
    assert lowbit.__version__ == installed
