"""What methods are given in the place of what calibration finds: sensitivities and importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lowbit.methods.registry import default_method, keywords
from lowbit.nn.names import Rule, listed
from lowbit.ptq.plan import Names

Plan = Mapping[Names, tuple[Rule, int]]  # with the identity of the weight


@dataclass(frozen=True)
class Given:
    """A sensitivity in the place of what calibration finds, or why there is none."""

    value: Tensor | None  # (N, K) or (K,)
    missing: str | None = None

    @property
    def relative_diagonal(self) -> Tensor:
        """The sensitivity."""
        assert self.value is not None
        return self.value

    @property
    def relative_hessian(self) -> Tensor:
        """None is there."""
        raise ValueError("a sensitivity of each weight is no Hessian")


def of_weights(plan: Plan, sensitivities: Mapping[str, Tensor]) -> dict[str, Given]:
    """The sensitivity of each weight, by the first name of the layer."""
    found = {names[0]: [t for name, t in sensitivities.items() if name in names] for names in plan}
    return {name: Given(values[0]) for name, values in found.items() if values}


def of_features(model: nn.Module, plan: Plan, importance: Mapping[str, Tensor]) -> dict[str, Given]:
    """The importance of input features, for every linear whose method takes it, by its first name."""
    found: dict[str, Given] = {}
    methods = set()
    for names, (rule, _) in plan.items():
        linear = model.get_submodule(names[0])
        if not isinstance(linear, nn.Linear) or rule.method is None:
            continue
        methods.add(rule.method)
        if "weights" in keywords(rule.method):
            values = [importance[name] for name in names if name in importance]
            found[names[0]] = (
                Given(values[0].to(linear.weight.device))
                if values
                else Given(None, "importance has no entry of it")
            )
    if methods and not found:
        listing = " and ".join(map(repr, sorted(methods)))
        raise ValueError(f"method {listing} takes no importance: use 'kmeans'")
    if found and all(given.missing for given in found.values()):
        raise ValueError(
            f"importance has no entry of a layer to quantize, such as {next(iter(found))!r}: it has "
            f"{listed(importance) or 'none'}"
        )
    return found


def with_method(rule: Rule) -> Rule:
    """With the default method of the format, if it has none."""
    assert rule.format is not None
    return rule.completed(default_method(rule.format), {})


def check_one_of(**sources: object) -> None:
    """Raises ValueError if more than one of these is there."""
    there = [name for name, value in sources.items() if value is not None]
    if len(there) > 1:
        raise ValueError(f"give {' or '.join(there)}, not {'both' if len(there) == 2 else 'all'}")


def check_sensitivities(plan: Plan, sensitivities: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a layer with a sensitivity is none to quantize, or its method takes none."""
    methods = {name: rule.method for names, (rule, _) in plan.items() for name in names}
    for name in sensitivities:
        if name not in methods:
            raise ValueError(f"sensitivities names {name!r}, which is not a layer to quantize")
        method = methods[name]
        if method is None or "weights" not in keywords(method):
            raise ValueError(f"{name}: method {method!r} takes no sensitivities: use 'kmeans'")
