"""lowbit as a quantization method of diffusers: `save_pretrained` and `from_pretrained` of models with packed weights.

`import lowbit` enters it in diffusers' tables as soon as those are imported. `lowbit.quantize_model` of a model of
diffusers, or of a module that holds some, lets them know; `lowbit.LowbitConfig("int8_g32")` quantizes one on load.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from lowbit.integrations.dense import cast_dense
from lowbit.integrations.dequantizing import packed_names, put_dense
from lowbit.integrations.quantizer import METHOD, LowbitConfig
from lowbit.io.save_load import checkpoint_state, load
from lowbit.nn.base import PackedModule
from lowbit.ptq import quantize_model

_KEY = "quantization_config"


class LowbitDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """What diffusers calls to load, save and dequantize a model."""

    quantization_config: Any  # a LowbitConfig
    _file: Path | None = None
    _dtype: torch.dtype | None = None
    _model: Any = None  # a weak reference

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError if there is no format to quantize to, or layers shall lie on a disk."""
        if not self.pre_quantized:
            self.quantization_config.selection()
        placed = kwargs.get("device_map")
        if isinstance(placed, dict) and "disk" in placed.values():
            raise ValueError(
                "device_map must not name the disk: lowbit's packed weights lie in memory"
            )

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Keeps the file for later: diffusers reads nothing of a checkpoint of lowbit.

        Raises:
            ValueError: it is no .safetensors file, or several.
        """
        if not self.pre_quantized:
            return loaded_keys
        if len(checkpoint_files) != 1 or not str(checkpoint_files[0]).endswith(".safetensors"):
            raise ValueError(
                "a checkpoint of lowbit for diffusers must be one .safetensors file (save_pretrained with a larger "
                f"max_shard_size), got {[str(f) for f in checkpoint_files]}"
            )
        self._file = Path(checkpoint_files[0])
        return []

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Nothing of a checkpoint of lowbit."""
        return {} if self.pre_quantized else state_dict

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """None: what is missing is an error of `lowbit.load`."""
        return [] if self.pre_quantized else missing_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._model = weakref.ref(model)

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """Keeps the dtype of what is dense; None is that of the file."""
        self._dtype = torch_dtype
        return torch_dtype

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if not self.pre_quantized:
            quantize_model(
                model,
                config.rules(),
                skip=config.skip or (),
                method=config.method,
                options=config.options,
                progress=False,
            )
            return model
        assert self._file is not None
        load(model, self._file, mmap=False)
        if self._dtype is not None:
            cast_dense(model, self._dtype)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The tensors of a checkpoint of lowbit and its header.

        Raises:
            ValueError: it shall be pickled.
        """
        model = self._model()
        if not any(isinstance(module, PackedModule) for module in model.modules()):
            return state_dict, {}
        if not safe_serialization:
            raise ValueError("safe_serialization must be True for packed weights, got False")
        return checkpoint_state(model)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        put_dense(model, packed_names(model), dtype)
        known = {key: value for key, value in model.config.items() if key != _KEY}
        model._internal_dict = type(model.config)(known)
        return model

    def make_dense(self, model: Any, dtype: torch.dtype | None) -> None:
        """As `model.dequantize()`, with a dtype of the weights."""
        self._dequantize(model, dtype)
        del model.hf_quantizer
        model.is_quantized = False

    @property
    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters."""
        return True


def mark(model: nn.Module) -> None:
    """Lets the models of diffusers in a module, or the module itself, know that they are quantized."""
    from diffusers.models.modeling_utils import ModelMixin

    if not isinstance(model, ModelMixin):
        for child in model.children():
            mark(child)
        return
    packed = any(isinstance(module, PackedModule) for module in model.modules())
    if not packed or getattr(model, "hf_quantizer", None) is not None:
        return
    marked: Any = model
    config: Any = LowbitConfig()
    marked.hf_quantizer = LowbitDiffusersQuantizer(config, pre_quantized=True)
    marked.hf_quantizer._model = weakref.ref(model)
    marked.is_quantized, marked.quantization_method = True, METHOD
    marked.register_to_config(**{_KEY: config})


auto.AUTO_QUANTIZER_MAPPING[METHOD] = LowbitDiffusersQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LowbitConfig
