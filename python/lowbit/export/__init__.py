"""Models in the files of other programs: GGUF of llama.cpp, folders of GPTQ and of compressed-tensors.

Packed weights keep their values, bit for bit: what a format cannot hold is an error that names the layer, or is
quantized anew where the caller says to what.

`gguf.to_gguf`, `gptq.to_gptq` and `compressed_tensors.to_compressed_tensors` each write one of them.
"""

from __future__ import annotations
