"""Exported C compiled and run: by the host's gcc under sanitizers, and for a Cortex-M4 in an emulator."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

STRICT = ("-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror")
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CORTEX_M4 = ("-O2", "-mcpu=cortex-m4", "-mthumb", "--specs=rdimon.specs", "-nostartfiles")
TRACED = "-DMODEL_TRACE"

# The emulated board: code from 0, data from 0x20000000, 4 MiB each.
_LINKER_SCRIPT = """\
MEMORY { CODE (rx) : ORIGIN = 0, LENGTH = 4M  DATA (rwx) : ORIGIN = 0x20000000, LENGTH = 4M }
ENTRY(start)
SECTIONS {
  .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) } > CODE
  .ARM.exidx : { *(.ARM.exidx*) } > CODE
  .data : { *(.data*) } > DATA AT > DATA
  .bss : { __bss_start__ = .; *(.bss*) *(COMMON) __bss_end__ = .; } > DATA
  end = .;
}
"""
_START = """\
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
extern int main(void);
extern void initialise_monitor_handles(void);
extern char __bss_start__, __bss_end__;
void start(void) {
  memset(&__bss_start__, 0, (size_t)(&__bss_end__ - &__bss_start__));
  initialise_monitor_handles();
  exit(main());
}
static void stuck(void) { exit(2); }
__attribute__((section(".vectors"), used)) static const uintptr_t vectors[16] = {
    0x20400000, (uintptr_t)start, (uintptr_t)stuck, (uintptr_t)stuck,
};
void _init(void) {}
void _fini(void) {}
"""

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
needs_cortex_m4 = pytest.mark.skipif(
    not all(map(shutil.which, ("arm-none-eabi-gcc", "qemu-system-arm"))),
    reason="needs gcc-arm-none-eabi, libnewlib-arm-none-eabi and qemu-system-arm",
)


def on_host(folder: Path, *flags: str, files: Sequence[Path] | None = None) -> tuple[int, str]:
    """Exit status and output of the files of a folder, or of those that are given."""
    program = folder / "host"
    sources = sorted(folder.glob("*.c")) if files is None else files
    command = ["gcc", *STRICT, *flags, f"-I{folder}", *map(str, sources), "-o", str(program), "-lm"]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ended = subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout + ended.stderr


def on_cortex_m4(folder: Path, *flags: str) -> tuple[int, str]:
    """The same on an emulated Cortex-M4, bare, which prints through its debugger's port."""
    place = folder / "cortex_m4"
    place.mkdir(exist_ok=True)
    (place / "start.c").write_text(_START)
    (place / "board.ld").write_text(_LINKER_SCRIPT)
    program = place / "program.elf"
    sources = map(str, (place / "start.c", *sorted(folder.glob("*.c"))))
    command = ["arm-none-eabi-gcc", *CORTEX_M4, *flags, f"-T{place / 'board.ld'}", *sources]
    built = subprocess.run(
        [*command, "-o", str(program)], check=False, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    emulator = ["qemu-system-arm", "-M", "mps2-an386", "-display", "none", "-monitor", "none"]
    emulator += ["-serial", "none", "-semihosting-config", "enable=on,target=native"]
    ended = subprocess.run(
        [*emulator, "-kernel", str(program)],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    return ended.returncode, ended.stdout + ended.stderr
