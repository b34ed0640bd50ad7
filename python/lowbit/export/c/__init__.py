"""Networks of integers as C for microcontrollers: `project.export_c` writes a folder of C99 that computes them."""

from __future__ import annotations
