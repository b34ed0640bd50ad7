"""The layers of the package: imports go one way, files are small, what is public is documented."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Mapping
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
    ("codebooks", "files", "float8", "importing", "late", "modes", "strides", "text"),
    ("format_names", "structured"),
    ("format_aliases", "format_checks"),
    ("formats", "_C", "_cuda"),
    ("forking", "packing"),
    ("weights",),
    ("reference",),
    ("layouts",),
    ("backends",),
    ("ops",),
    ("binary", "explanation", "int8", "methods", "optim"),
    ("fp8",),
    ("nn",),
    ("decoder", "integer", "io"),
    ("ptq",),
    ("qat", "integrations"),
    ("export",),
    ("cli",),
    ("quantize",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Third-party packages that only these modules may import; torch may be imported anywhere but in
# `formats`, numpy anywhere.
RESTRICTED = {
    "accelerate": {"integrations", "nn"},
    "constriction": {"io"},
    "diffusers": {"integrations"},
    "faiss": {"methods"},
    "gguf": {"export", "integrations", "io"},
    "matplotlib": {"ptq"},
    "rich": {"cli", "ptq"},
    "safetensors": {"io"},
    "scipy": {"codebooks"},
    "sglang": {"integrations"},
    "sklearn": {"qat"},
    "tomli": {"ptq"},
    "tomllib": {"ptq"},
    "tqdm": {"ptq"},
    "triton": set(),
    "transformers": {"cli", "decoder", "export", "integrations"},
    "typer": {"cli"},
    "vllm": {"integrations"},
}


# Files that reach for compiled code though they are neither a backend nor the decoder. Only ever shorter.
COMPILED_EXCEPTIONS: set[str] = set()
# Modules that need an optional package, by the file that imports them when they are needed.
OPTIONAL_IMPORTS = {
    ("python/lowbit/io/readers/gguf_reader.py", "lowbit.io.readers.gguf"),
    ("python/lowbit/integrations/load.py", "lowbit.integrations.transformers"),
    ("python/lowbit/ptq/importance.py", "lowbit.io.imatrix"),
    # Runs while transformers is imported, whose models are not there yet.
    ("python/lowbit/integrations/quantizer.py", "lowbit.integrations.quantizing"),
    ("python/lowbit/integrations/quantizer.py", "lowbit.integrations.plans"),
}
COMPILED = {"_C", "_cuda", "triton_kernels"}
COMPILED_HOMES = {"backends", "decoder"}
KERNEL_IMPORTS = {"__future__", "dataclasses", "torch", "triton"}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [path for path in FILES if path != PACKAGE / "__init__.py"]
NAMES = {module_of(path) for path in MODULES} | {"lowbit._C", "lowbit._cuda"}


def reached(tree: ast.AST) -> frozenset[str]:
    """The modules of lowbit that a tree names, dotted, at any depth of nesting."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                # From the package itself only modules are imported.
                is_module = whole in NAMES or node.module == "lowbit"
                found.add(whole if is_module else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lowbit":
            found.add(f"lowbit.{node.attr}")
    return frozenset(name for name in found if name.split(".")[0] == "lowbit")


@functools.cache
def imported(path: Path) -> frozenset[str]:
    return reached(parse(path))


def lowbit_imports(path: Path) -> set[str]:
    """The layers of lowbit that a file reaches."""
    return {name.split(".")[1] for name in imported(path) if name != "lowbit"}


def third_party_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The names of one circle, or nothing."""
    done: set[str] = set()

    def visit(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := visit(other, [*above, name]):
                return found
        done.add(name)
        return []

    for name in graph:
        if found := visit(name, []):
            return found
    return []


def test_imports_go_one_way() -> None:
    offenders = []
    for path in MODULES:
        layer = layer_of(path)
        if layer not in LEVEL:
            offenders.append(f"{name_of(path)}: {layer} has no place in LAYERS")
            continue
        for name in sorted(lowbit_imports(path) - {layer}):
            if name not in LEVEL:
                offenders.append(f"{name_of(path)}: {name} is no module of lowbit")
            elif LEVEL[name] >= LEVEL[layer]:
                offenders.append(f"{name_of(path)}: imports {name}, which is not below {layer}")
    assert not offenders, "\n".join(offenders)


def test_no_module_imports_the_package_itself() -> None:
    """`import lowbit` and `lowbit.x` reach whatever the package shows, from any layer."""
    offenders = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Import)
        and any(alias.name.split(".")[0] == "lowbit" for alias in node.names)
    ]
    assert not offenders, "\n".join(offenders)


def test_imports_stand_at_the_top() -> None:
    """But those of optional packages and the command line's, which starts before torch is there."""
    found = {
        (name_of(path), name)
        for path in MODULES
        if layer_of(path) != "cli"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in ast.walk(node)
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for name in reached(statement) - {"lowbit._cuda"}
    }
    assert found == OPTIONAL_IMPORTS


def test_imports_make_no_circle() -> None:
    graph = {module_of(path): set(imported(path)) for path in MODULES}
    found = circle(graph)
    assert not found, " -> ".join(found)


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_third_party_imports() -> None:
    offenders = []
    for path in FILES:
        imports, layer = third_party_imports(path), layer_of(path)
        misplaced = {name for name in imports & RESTRICTED.keys() if layer not in RESTRICTED[name]}
        if layer == "formats":
            misplaced |= imports & {"torch"}
        offenders += [f"{name_of(path)}: {name}" for name in sorted(misplaced)]
    assert not offenders, "\n".join(offenders)


def test_compiled_code_has_its_homes() -> None:
    """Only backends and the decoder touch `_C`, `_cuda` and the Triton kernels; the list of exceptions
    holds no file that needs none.
    """
    touching = {
        name_of(path)
        for path in MODULES
        if lowbit_imports(path) & COMPILED and layer_of(path) not in COMPILED_HOMES
    }
    offenders = [f"{name}: touches compiled code" for name in touching - COMPILED_EXCEPTIONS]
    offenders += [f"{name}: is no exception any more" for name in COMPILED_EXCEPTIONS - touching]
    assert not offenders, "\n".join(sorted(offenders))


def test_triton_kernels_stand_alone() -> None:
    """They import Triton, torch and each other, and are imported by the backend alone, when they are needed."""
    kernels = sorted((ROOT / "kernels").glob("*.py"))
    allowed = KERNEL_IMPORTS | {path.stem for path in kernels}
    offenders = [
        f"{name_of(path)}: {name}"
        for path in kernels
        for name in sorted(third_party_imports(path) - allowed | imported(path))
    ]
    assert not offenders, "\n".join(offenders)


def test_layers_are_in_use() -> None:
    assert {layer_of(path) for path in MODULES} | {"_C", "_cuda"} == LEVEL.keys()


LAYOUT_NAMES = {"CANONICAL", "N16", "K16", "M16", "canonical", "n16", "k16", "m16"}


def test_no_layout_is_asked_its_name() -> None:
    """What differs between layouts is a method of their class; which one a device reads, the backends know."""
    offenders = []
    for path in MODULES:
        if layer_of(path) in ("layouts", "backends"):
            continue
        for compare in (n for n in ast.walk(parse(path)) if isinstance(n, ast.Compare)):
            parts = [vars(part) for part in ast.walk(compare)]
            words = {part.get(key) for part in parts for key in ("id", "attr", "value")}
            if words & LAYOUT_NAMES:
                offenders.append(f"{name_of(path)}: {ast.unparse(compare)}")
    assert not offenders, "\n".join(offenders)


def sources() -> list[Path]:
    folders = ("python", "tests", "csrc", "kernels", "benchmarks")
    suffixes = {".py", ".pyi", ".h", ".cpp", ".cuh", ".cu"}
    return sorted(p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes)


def test_files_are_small() -> None:
    sizes = {name_of(path): len(path.read_text().splitlines()) for path in sources()}
    offenders = [f"{name}: {lines} lines" for name, lines in sizes.items() if lines > MAX_LINES]
    assert not offenders, "\n".join(offenders)


def test_files_open_with_their_contract() -> None:
    """A docstring of a few lines, or in headers a comment in the first line."""
    offenders = []
    for path in sources():
        text, name = path.read_text(), name_of(path)
        if path.suffix == ".py":
            contract = ast.get_docstring(ast.parse(text)) or ""
            if not contract:
                offenders.append(f"{name}: no docstring")
            most = LONG_CONTRACTS.get(name, MAX_CONTRACT_LINES)
            if (lines := len(contract.splitlines())) > most:
                offenders.append(f"{name}: a docstring of {lines} lines, {most} at most")
        elif path.suffix in (".h", ".cuh") and not text.startswith("//"):
            offenders.append(f"{name}: the first line must say what the file is")
    assert not offenders, "\n".join(offenders)


CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512vbmi", "avx512vnni",
    "avx512vpopcntdq",
)  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="vectors of x86")
def test_headers_compile_alone() -> None:
    """Those that everything stands on: each includes what it uses."""
    csrc = ROOT / "csrc"
    headers = [str(p) for folder in ("core", "cpu/simd") for p in (csrc / folder).glob("*.h")]
    flags = ["-std=c++20", "-w", "-fopenmp", f"-I{csrc}", *(f"-m{flag}" for flag in CPU_FLAGS)]
    command = ["g++", *flags, "-fsyntax-only", "-x", "c++", *headers]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


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


def test_what_is_public_is_documented() -> None:
    offenders = [f"{name_of(path)}: {name}" for path in FILES for name in undocumented(parse(path))]
    assert not offenders, "\n".join(offenders)


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
