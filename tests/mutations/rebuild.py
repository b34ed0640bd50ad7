"""Builds the C++ of a copy of the tree once and then, for each fault, only the units that see it.

They are those of one instruction set that include the changed file, compiled with little optimization; the other
objects stay as they were.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

BITS = "X(1) X(2) X(3) X(4) X(5) X(6) X(8)"
FEW_BITS = "X(3) X(4)"


class Build:
    """A build folder of `tree`, with all that the C++ tests and the module need."""

    def __init__(self, tree: Path) -> None:
        self.tree, self.folder = tree, tree / "build" / "mutants"
        # The build tools of the interpreter's environment.
        tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        self.environment = {
            **os.environ,
            "PATH": tools,
            "CCACHE_BASEDIR": str(tree),
            "CCACHE_SLOPPINESS": "locale",
        }
        options = [
            "-DCMAKE_BUILD_TYPE=Release", "-DSKBUILD=2", "-DLOWBIT_CPP_TESTS=ON", "-DLOWBIT_CUDA=OFF",
            "-DLOWBIT_WERROR=ON", f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-DCMAKE_PREFIX_PATH={sysconfig.get_paths()['purelib']}",
        ]  # fmt: skip
        if shutil.which("ccache"):
            options.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
        self._run("cmake", "-G", "Ninja", "-S", str(tree), "-B", str(self.folder), *options)
        self._run("cmake", "--build", str(self.folder))
        self.includes = dict(self._includes())
        # Fewer widths are compiled in a third of the time.
        header = tree / "csrc/cpu/weights/common-inl.h"
        text = header.read_text()
        if text.count(BITS) != 1:
            raise ValueError(f"{header} must name all bit widths once: {BITS}")
        self._few_bits = header, text.replace(BITS, FEW_BITS)
        self.saved: dict[str, bytes] = {}

    def _run(self, *command: str, cwd: Path | None = None) -> str:
        ended = subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True
        )
        if ended.returncode:
            raise RuntimeError(f"{shlex.join(command)}:\n{(ended.stdout + ended.stderr)[-3000:]}")
        return ended.stdout

    def _includes(self) -> list[tuple[str, set[Path]]]:
        found = []
        for block in self._run("ninja", "-t", "deps", cwd=self.folder).strip().split("\n\n"):
            first, *lines = block.strip().splitlines()
            files = {(self.folder / line.strip()).resolve() for line in lines}
            found.append((first.split(":")[0], files))
        return found

    def _command(self, target: str) -> str:
        return self._run("ninja", "-t", "commands", "-s", target, cwd=self.folder).strip()

    def units(self, path: str, isa: str) -> list[str]:
        """Objects of the library that include `path`, of one instruction set or of none."""
        file, found = (self.tree / path).resolve(), []
        for unit, files in self.includes.items():
            if file not in files or not re.search("lowbit_core|/unit_", unit):
                continue
            words = self._command(unit)
            source = re.search(r" -c (\S+)", words)
            text = Path(source[1]).read_text() if source else ""
            named = re.search(r"LOWBIT_ISA[ =](\w+)", words + text)
            if named is None or named[1] == isa:
                found.append(unit)
        if not found:
            raise ValueError(f"no unit of {isa or 'the library'} includes {path}")
        return found

    def rebuild(self, path: str, isa: str, target: str, few_bits: bool) -> None:
        """Compiles what sees `path` and links `target`; `restore` undoes it."""
        self.saved = {unit: (self.folder / unit).read_bytes() for unit in self.units(path, isa)}
        header, text = self._few_bits
        if few_bits and not path.endswith(header.name):
            self._header = header.read_text()
            header.write_text(text)
        level = "-O0" if isa == "scalar" else "-O1"
        for unit in self.saved:
            self._run("sh", "-c", f"{self._command(unit)} {level} -w", cwd=self.folder)
        # Without the check of symbols: only full optimization inlines all of them.
        (link,) = [c for c in self._command(target).split(" && ") if f" -o {target}" in c]
        self._run("sh", "-c", link, cwd=self.folder)

    def restore(self) -> None:
        """Puts the objects back that the last `rebuild` replaced."""
        for unit, data in self.saved.items():
            (self.folder / unit).write_bytes(data)
        self.saved = {}
        header, text = self._few_bits
        if header.read_text() == text:
            header.write_text(self._header)
