"""Kernels for neural networks whose weights take 1 to 8 bits, in any codebook, on CPU and GPU.

Names are imported when they are first used, so `lowbit.formats()`, `lowbit.kernels()` and
`lowbit._C` need numpy alone; everything else needs torch. Nothing is in torch.ops.lowbit before:
import lowbit.nn and lowbit.optim, which register the ops, to load a graph from torch.export.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("torch") is not None:
    # Before lowbit._C: both then share the OpenMP runtime of torch. Two cost milliseconds a call.
    import torch  # noqa: F401

# Now, not when it is first used: it must know of a fork that happens in between.
from lowbit import _C, importing, late
from lowbit.formats import Format, all_formats

if TYPE_CHECKING:
    from lowbit import binary, codebooks, fp8, int8, integrations, methods, nn, optim, qat
    from lowbit._C import kernels
    from lowbit.explanation import explain
    from lowbit.integrations.dequantizing import dequantize_model
    from lowbit.integrations.load import load_model
    from lowbit.integrations.quantizer import LowbitConfig
    from lowbit.io.save_load import load, save
    from lowbit.methods import quantize
    from lowbit.ops.linear import linear
    from lowbit.ops.many import linear_many
    from lowbit.ops.weights import dequantize
    from lowbit.ptq import fold_norms, quantize_llm_int8, quantize_model
    from lowbit.weights.quantized import QuantTensor

# Where each name lives; None for a module.
_HOMES = {
    "LowbitConfig": "lowbit.integrations.quantizer",
    "QuantTensor": "lowbit.weights.quantized", "binary": None, "codebooks": None, "dequantize": "lowbit.ops.weights",
    "dequantize_model": "lowbit.integrations.dequantizing", "explain": "lowbit.explanation", "fold_norms": "lowbit.ptq",
    "fp8": None, "int8": None, "integrations": None, "kernels": "lowbit._C", "linear": "lowbit.ops.linear",
    "linear_many": "lowbit.ops.many", "methods": None,
    "load": "lowbit.io.save_load", "load_model": "lowbit.integrations.load", "nn": None, "optim": None, "qat": None,
    "quantize": "lowbit.methods", "quantize_llm_int8": "lowbit.ptq",
    "quantize_model": "lowbit.ptq", "save": "lowbit.io.save_load",
}  # fmt: skip
# The extra of this package that installs a package.
_EXTRAS = {
    "accelerate": "models", "gguf": "models", "matplotlib": "plots", "safetensors": "torch", "scipy": "codebooks",
    "sklearn": "qat", "torch": "torch", "transformers": "models",
}  # fmt: skip
__all__ = [
    "Format", "LowbitConfig", "QuantTensor", "__version__", "binary", "codebooks", "dequantize", "dequantize_model",
    "explain", "fold_norms", "formats",
    "fp8", "int8", "integrations", "kernels", "linear", "linear_many", "load", "load_model", "methods", "nn", "optim",
    "qat", "quantize", "quantize_llm_int8", "quantize_model", "save",
]  # fmt: skip


def _dequantize(*args: Any) -> Any:
    from lowbit.ops.weights import dequantize as decode

    return decode(*args)


late.dequantize = _dequantize
late.usable_threads, late.prepack, late.unprepack = _C.usable_threads, _C.prepack, _C.unprepack


def _rebuild(*args: Any) -> Any:
    from lowbit.weights.quantized import _rebuild as rebuild

    return rebuild(*args)


if sys.modules.get("torch") is not None:
    # torch.load(weights_only=True) looks a pickled QuantTensor up by this name; it need not be imported for that.
    _rebuild.__module__ = "lowbit.weights.quantized"
    sys.modules["torch"].serialization.add_safe_globals([_rebuild])


def _quantized(model: Any) -> None:
    # A model of transformers cannot be without this module.
    if "transformers.modeling_utils" in sys.modules:
        from lowbit.integrations.quantizer import mark

        mark(model, in_config=True)
    if "diffusers.models.modeling_utils" in sys.modules:
        importlib.import_module("lowbit.integrations.diffusers").mark(model)


late.quantized = _quantized


def _register(auto: Any) -> None:
    # transformers before 5 has no such table.
    if hasattr(auto, "register_quantizer"):
        importlib.import_module("lowbit.integrations.quantizer")


def _register_in_diffusers(auto: Any) -> None:
    importlib.import_module("lowbit.integrations.diffusers")


def _add_adapters(lora: Any) -> None:
    importlib.import_module("lowbit.integrations.adapters")


def _add_ia3(ia3: Any) -> None:
    importlib.import_module("lowbit.integrations.adapters_ia3")


def _keep_experts(conversion: Any) -> None:
    shared = importlib.import_module("lowbit.integrations.adapters_shared")
    if hasattr(conversion, "_convert_peft_config_moe"):
        shared.keep_experts(conversion)


def _add_experts(moe: Any) -> None:
    experts = importlib.import_module("lowbit.nn.experts")
    moe.ALL_EXPERTS_FUNCTIONS.register(experts.IMPLEMENTATION, experts.experts_forward)


def _add_decompositions(exporter: Any) -> None:
    importlib.import_module("lowbit.ops")
    importlib.import_module("lowbit.ops.decompositions").add_to(exporter)


if "torch" in sys.modules:
    importing.when_imported("torch.onnx._internal.exporter._decomp", _add_decompositions)
    importing.when_imported("transformers.integrations.moe", _add_experts)
    importing.when_imported("transformers.quantizers.auto", _register)
    importing.when_imported("diffusers.quantizers.auto", _register_in_diffusers)
    importing.when_imported("peft.tuners.lora", _add_adapters)
    importing.when_imported("peft.tuners.ia3", _add_ia3)
    importing.when_imported("peft.utils.transformers_weight_conversion", _keep_experts)


def formats() -> dict[str, Format]:
    """The built-in formats by name."""
    return all_formats()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("lowbit")
    if name not in _HOMES:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    home = _HOMES[name]
    try:
        module = importlib.import_module(f"lowbit.{name}" if home is None else home)
    except ModuleNotFoundError as e:
        extra = _EXTRAS.get((e.name or "").partition(".")[0])
        if extra is None:
            raise
        raise ModuleNotFoundError(
            f"lowbit.{name} needs {e.name}, which is not installed: pip install 'lowbit[{extra}]'"
        ) from e
    value = module if home is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
