"""Names that other programs have for formats, and what is said of names that nobody has."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit.format_aliases import ALIASES
from lowbit.formats import FORMATS, Format, parse


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_is_a_format(alias: str):
    """Of the name that this package has for it, which is what files hold."""
    assert alias not in FORMATS
    for name in (alias, alias.upper(), alias.replace("_", "-")):
        assert parse(name) == parse(ALIASES[alias])
        assert parse(name).name == ALIASES[alias]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("fp8", "e4m3"), ("Q4_K_M", "q4_k"), ("w4a16", "int4"), ("w4a16_g64", "int4_g64"), ("W8A8", "int8_row_a8"),
        ("w8a8_g32", "int8_a8_g32"), ("4bit", "int4"), ("NF4", "nf4"), ("INT4-g32", "int4_g32"), ("8-bit", "int8"),
        ("fp8_e5m2", "e5m2"), ("nf4-row-bf16", "nf4_row_bf16"),
    ],
)  # fmt: skip
def test_what_people_type(typed: str, meant: str):
    assert parse(typed) == parse(meant)
    assert parse(parse(typed).spec) == parse(meant)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("nf5", "did you mean 'nf4' or 'nf3'?"),
        ("int7_g64", "did you mean"),
        ("nf4_group64", "did you mean 'nf4'"),
        ("gptq", "'gptq' is a method: give it as method='gptq'"),
        ("awq_int4", "'awq' is a method"),
        ("zzzz", "expected a name of lowbit.formats\\(\\), optionally followed by"),
    ],
)
def test_what_is_said_of_unknown_names(typed: str, hint: str):
    """In one line of the screen or two: no list of every name."""
    with pytest.raises(ValueError, match=f"unknown format {typed!r}.*{hint}") as caught:
        parse(typed)
    assert len(str(caught.value)) < 250


def test_a_format_of_ones_own_may_have_such_a_name():
    mine = Format.lut(bits=2, table=[-1, 0, 1, 2], name="fp8")
    assert parse(mine.spec) == mine
    assert mine != parse("fp8")


def test_methods():
    """`lowbit.methods()` beside the package of that name."""
    found = lowbit.methods()
    assert found.keys() == lowbit.methods.METHODS.keys()
    assert found["gptq"].calibrates == "needs"
    assert found["kmeans"].calibrates is True
    assert found["rtn"].calibrates is False
    assert "act_order" in found["gptq"].options
    assert not {"hessian", "weights", "table", "held_out"} & {
        k for m in found.values() for k in m.options
    }
    assert all(m.summary and "\n" not in m.summary for m in found.values())


def test_wrong_methods_and_options():
    weight = torch.randn(8, 32)
    with pytest.raises(ValueError, match="got 'gtpq'; did you mean 'gptq'"):
        lowbit.quantize(weight, "int4", "gtpq")
    with pytest.raises(
        ValueError, match="method 'gptq' takes no act_ordr; did you mean 'act_order'"
    ):
        lowbit.quantize(weight, "int4", "gptq", act_ordr=True)
    with pytest.raises(
        ValueError, match="method 'twn' takes no bits; it takes threshold, granularity"
    ):
        lowbit.quantize(weight, "ternary", "twn", bits=2)
