"""`make docs`: the reference as web pages, from the docstrings, by pdoc: `python docs/reference.py FOLDER`."""

import sys
from pathlib import Path

import pdoc
import pdoc.render

import lowbit

# Beside what `lowbit.__all__` names.
MODULES = (
    "lowbit.ptq",
    "lowbit.layouts",
    "lowbit.reference",
    "lowbit.decoder.runner",
    "lowbit.decoder.sampling",
    "lowbit.io.imatrix",
    "lowbit.io.readers.registry",
    "lowbit.io.readers.gguf",
    "lowbit.export.gguf",
    "lowbit.export.gptq",
    "lowbit.export.compressed_tensors",
    "lowbit.export.c.project",
    "lowbit.integer",
)

(folder,) = sys.argv[1:]
# Names are imported when they are first used: a generator must find them in the module.
for name in lowbit.__all__:
    setattr(lowbit, name, getattr(lowbit, name))
pdoc.render.configure(docformat="google", footer_text=f"lowbit {lowbit.__version__}")
# Of the name of a function there is a module, too, that says where its names went.
pdoc.pdoc("lowbit", "!lowbit.quantize", *MODULES, output_directory=Path(folder))
