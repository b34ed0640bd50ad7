"""lowbit as a quantization method of transformers: `quant_method` "lowbit".

`import lowbit` enters it in transformers' tables, as soon as those are imported (`lowbit.importing`): nothing is to be
called, and `import lowbit` does not import transformers. Without it transformers refuses a folder of lowbit
(`lowbit.io.native.marker_of`). What needs models is imported in functions: this runs while transformers is imported.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.formats import Format, as_format
from lowbit.nn.base import PackedModule
from lowbit.nn.names import (
    DEFAULT_SKIP,
    Rule,
    Rules,
    Selection,
    as_rule,
    compile_patterns,
    rules_of,
    skip_of,
)

if TYPE_CHECKING:
    from lowbit.integrations.plans import Held
    from lowbit.integrations.quantizing import Job


class _Method(str, enum.Enum):
    """As transformers and diffusers have the names of theirs."""

    LOWBIT = "lowbit"


METHOD = _Method.LOWBIT


class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How `from_pretrained` quantizes a dense model as it loads it, a layer at a time.

    The arguments are those of `lowbit.quantize_model`. A folder that is quantized already says
    itself how, and an argument beside it changes nothing.

    Args:
        format: a Format or its name, or a recipe {pattern: format, `Rule` or None}.
        method, options: as in `lowbit.quantize_model`; no calibration.
        skip: patterns of modules to leave as they are; by default the head, "lm_head".
        modules_to_not_convert: the name that other methods of transformers have for `skip`.
        bits, group_size: as in `lowbit.quantize_model`; what is kept is the format that they stand for.

    Raises:
        TypeError: an argument is unknown, or of another type.
        ValueError: a format is unknown, `skip` is given by both names, or `quant_method` (in a
            config.json) is that of another method.

    Example:
        >>> AutoModelForCausalLM.from_pretrained(
        ...     path, quantization_config=lowbit.LowbitConfig("nf4")
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        format: Rules | None = None,
        *,
        method: str | None = None,
        options: Mapping[str, Any] | None = None,
        skip: Iterable[str] | None = None,
        modules_to_not_convert: Iterable[str] | None = None,
        bits: int | None = None,
        group_size: int | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD.value!r}, got {quant_method!r:.100}")
        if unknown:
            known = "format, method, options, skip, modules_to_not_convert, bits and group_size"
            raise TypeError(
                f"LowbitConfig takes {known}, got {', '.join(sorted(unknown))} (in a config.json: of a newer version?)"
            )
        if skip is not None or modules_to_not_convert is not None:
            skip = skip_of(skip, modules_to_not_convert)
        if bits is not None or group_size is not None:
            format = rules_of(format, bits, group_size)
        self.quant_method: Any = METHOD
        self.format = None if format is None else _as_json(format)
        self.method = method
        self.options = dict(options) if options else None
        self.skip = None if skip is None else list(compile_patterns(skip))

    def rules(self) -> Rules:
        """What modules become; ValueError if there is no format."""
        if self.format is None:
            raise ValueError(
                "LowbitConfig needs a format to quantize a dense model, as LowbitConfig('nf4'); without one it is "
                "for folders that are quantized already"
            )
        return _rules(self.format)

    def selection(self) -> Selection:
        """Which modules are quantized and how; ValueError if there is no format."""
        return Selection(self.rules(), DEFAULT_SKIP if self.skip is None else self.skip)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: what differs from the default."""
        return {key: value for key, value in super().to_dict().items() if value is not None}


def _rules(rules: Any) -> Rules:
    """Rules as `_as_json` gives them."""
    if not isinstance(rules, list):
        return rules  # type: ignore[no-any-return]
    return {key: Rule(**rule) if isinstance(rule, dict) else rule for key, rule in rules}


def _as_json(rules: Any) -> str | list[Any]:
    """Pairs for a recipe: transformers sorts the keys of objects, and the first pattern counts."""
    given = _rules(rules)
    if not isinstance(given, Mapping):
        return as_format(given).spec if isinstance(given, Format) else as_format(given).name
    Selection(given)  # checks the patterns
    made: list[Any] = []
    for pattern, entry in given.items():
        rule = as_rule(entry)
        spec = None if rule.format is None else rule.format.spec
        whole = {"format": spec, "method": rule.method, "options": dict(rule.options)}
        made.append([pattern, spec if rule.method is None and not rule.options else whole])
    return made


class LowbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls to load, save, train and dequantize models of packed weights."""

    quantization_config: LowbitConfig
    _job: Job | None = None
    _held: Held | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError if there is no format to quantize to, or layers shall lie on a disk."""
        if not self.pre_quantized:
            self.quantization_config.selection()
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ValueError(
                "device_map must not name the disk: lowbit's packed weights lie in memory"
            )

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        from lowbit.integrations.quantizing import OnLoad, Stored

        config = self.quantization_config
        self._job = (
            Stored(model, dtype or model.dtype, checkpoint_files)
            if self.pre_quantized
            else OnLoad(model, config.selection(), config.method, config.options or {})
        )

    def update_attn_implementation(self, config: Any) -> Any:
        """Of a folder that names no dtype, transformers would take that of the first scales."""
        if self.pre_quantized and config.dtype is None:
            config.dtype = torch.float32
        return config

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of a dense checkpoint is quantized as it is read."""
        return self._job is not None and self._job.quantizes(param_name)

    def get_quantize_ops(self) -> Any:
        """What quantizes such a tensor."""
        assert self._job is not None
        return self._job.operation()

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """None for a folder of lowbit: its names are those of the model."""
        if self.pre_quantized:
            return []
        made: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return made

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Keeps the rules of tensor parallelism that name packed layers until these are there."""
        super().update_parallel_plan(model, plan)
        if plan is model.tp_plan and self._job is not None:
            from lowbit.integrations.plans import Held

            self._held = Held(model, self._job.layers(), not self.pre_quantized)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._job is not None
        self._job.finish()
        self._job = None
        if self._held is not None:
            self._held.apply(model)
            self._held = None
        return model

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """The tensors of a checkpoint of lowbit and its header, for `save_pretrained`."""
        from lowbit.integrations.quantizing import state_to_save

        return state_to_save(model, self.quantization_config)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from lowbit.integrations.quantizing import dequantize_modules

        dequantize_modules(model, dtype)
        return model

    def make_dense(self, model: Any, dtype: torch.dtype | None) -> None:
        """As `model.dequantize()`."""
        model.dequantize(dtype=dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(LowbitConfig)
    register_quantizer(METHOD)(LowbitQuantizer)


def mark(model: nn.Module, *, in_config: bool = False) -> None:
    """Lets transformers know that a model of it is quantized, so that `save_pretrained` writes it, Trainer refuses to
    train it without adapters, and `dequantize` works; also of models within another module, as sentence-transformers
    has them.

    Args:
        model: a model, or a module that holds some.
        in_config: its configuration says so at once, not only when it is saved.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        for child in model.children():
            mark(child, in_config=in_config)
        return
    if getattr(model, "hf_quantizer", None) is not None or not any(
        isinstance(module, PackedModule) for module in model.modules()
    ):
        return
    marked: Any = model
    config = LowbitConfig()
    marked.hf_quantizer = LowbitQuantizer(config, pre_quantized=True)
    marked.is_quantized, marked.quantization_method = True, METHOD
    if in_config:
        marked.config.quantization_config = config
        marked.config.dtype = marked.config.dtype or _dtype_of(marked)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """That of what is dense, or, where all is packed, of what a weight stands for."""
    dense = (p.dtype for p in model.parameters() if p.is_floating_point())
    packed = (m.dtype for m in model.modules() if isinstance(m, PackedModule))
    found: torch.dtype = next(dense, None) or next(packed)
    return found
