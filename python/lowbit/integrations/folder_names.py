"""What a transformers model calls the tensors of a folder, of experts that have a tensor each too.

transformers joins the weights of a layer's experts to one parameter, and gates with what they multiply. Here each is
a linear of a `QuantExperts`: `experts.3.gate_proj` of a folder is `experts.gate_proj.3` of the model, as it is stored.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightRenaming

from lowbit.files import shown
from lowbit.nn.experts import HALVES, projections

_WEIGHT = ".weight"


class Names:
    """The names of a model's tensors, by those of a folder.

    Attributes:
        experts: the linears of experts, by the names that `nn.stand_ins` gives them, that tensors were found of.
    """

    def __init__(self, model: PreTrainedModel, path: Path) -> None:
        self._model, self._path = model, path
        self._wanted = model.state_dict().keys()
        self._modules = dict(model.named_modules())
        every = get_model_conversion_mapping(model)
        # As transformers: all that rename, then one that converts.
        self._renamings = [r for r in every if isinstance(r, WeightRenaming)]
        self._converters = [r for r in every if not isinstance(r, WeightRenaming)]
        self.experts: set[str] = set()

    def has(self, layer: str) -> bool:
        """Whether the model has a layer of this name, experts included."""
        known = layer in self._modules or layer in self.experts
        return known or layer.rpartition(".")[0] in self._wanted

    def layer(self, stored: str) -> str:
        """Of a layer, by the name of its module."""
        return self.tensor(stored + _WEIGHT).removesuffix(_WEIGHT)

    def tensor(self, stored: str) -> str:
        """Of a tensor; what the model has not keeps its name.

        Raises:
            NotImplementedError: transformers does something else to it than to put experts together.
        """
        name = stored
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        for converter in self._converters:
            renamed, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return self._expert(stored, name, self._own(renamed), converter, pattern)
        return self._own(name)

    def _own(self, name: str) -> str:
        """With or without the prefix of a head's base."""
        prefix = f"{self._model.base_model_prefix}."
        if name not in self._wanted and prefix != ".":
            for other in (prefix + name, name.removeprefix(prefix)):
                if other in self._wanted:
                    return other
        return name

    def _expert(self, stored: str, name: str, joined: str, converter: Any, pattern: str) -> str:
        parent, _, projection = joined.rpartition(".")
        module = self._modules.get(parent)
        if module is None:
            return name
        steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
        number = re.search(pattern.replace("*.", r"(\d+)\."), name)
        halves = projection == "gate_up_proj" and len(converter.source_patterns) == 2
        expected = [(MergeModulelist, 0), (Concatenate, 1)] if halves else [(MergeModulelist, 0)]
        if (
            number is None
            or steps != expected
            or len(converter.source_patterns) != 1 + halves
            or projection not in projections(module)
            or not (module.is_concatenated or not halves)
        ):
            raise NotImplementedError(
                f"{self._path}: transformers fuses {shown(stored)} with other tensors of a "
                f"{type(self._model).__name__}, in a way that no packed layer can hold yet"
            )
        half = HALVES[converter.source_patterns.index(pattern)] if halves else projection
        made = f"{parent}.{half}.{int(number[1])}"
        self.experts.add(made)
        return made + _WEIGHT
