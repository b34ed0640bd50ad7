"""Every function that hands tensors to a kernel gives the same bits however its operands lie, or says what it wants."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import strided_layers
import strided_methods
import strided_products
import strided_terms
import torch
from strided import CASES, flat, same_bits, walk
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit import strides

FILLED_BY = (strided_layers, strided_methods, strided_products, strided_terms)  # CASES


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", CASES)
def test_operands_may_lie_anyhow(name: str) -> None:
    for m in (5, 1):
        c = CASES[name](m)
        torch.manual_seed(m)
        for what, given, in_order, refused in walk(c):
            if refused:
                with pytest.raises(ValueError, match="contiguous"):
                    c.call(**given)
                continue
            torch.manual_seed(3)
            expected = flat(c.call(**in_order))
            torch.manual_seed(3)
            made = flat(c.call(**given))
            assert len(made) == len(expected)
            for i, (a, b) in enumerate(zip(made, expected, strict=True)):
                if c.exact:
                    assert same_bits(a, b), f"M = {m}, {what}: result {i} differs"
                else:
                    torch.testing.assert_close(a, b, msg=f"M = {m}, {what}: result {i} differs")


def test_all_were_walked(request: pytest.FixtureRequest) -> None:
    """At least this many (function, operand, stride kind): the number is printed with -s."""
    walked = sum(len(list(walk(make(m)))) for make in CASES.values() for m in (5, 1))
    print(f"{walked} combinations of function, operand and stride kind, {len(CASES)} functions")
    assert walked >= 4000


def test_every_op_is_walked() -> None:
    """A new op fails here until the walk calls it."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.add(op.name().split(".")[0])
            return op(*args, **(kwargs or {}))

    called: set[str] = set()
    for make in CASES.values():
        c = make(2)
        with Record():
            c.call(**c.operands)
    schemas = torch._C._jit_get_all_schemas()
    ops = {schema.name for schema in schemas if schema.name.startswith("lowbit::")}
    assert ops - called == set()


def test_addresses_are_taken_in_one_place() -> None:
    """`data_ptr` is called in strides.py alone; elsewhere it tells tensors apart, or whether rows are aligned."""
    package = Path(lowbit.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"\.data_ptr\(\)", path.read_text())
    }
    others = {f"io/{name}.py" for name in ("safetensors_file", "save_load")}
    others |= {"nn/fp8.py", "cli/run.py", "ptq/scaling.py"}
    aligned = {
        f"backends/{name}.py" for name in ("cuda/weights", "cuda/fp8_matmul", "triton/fp8_matmul")
    }
    assert found == {"strides.py", *others, *aligned}


@pytest.mark.parametrize(
    "bad", (torch.ones(4, 6)[:, ::2], torch.ones(3).expand(4, 3), torch.ones(3, 4).t())
)
def test_addresses_of_other_strides_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous tensors, got shape"):
        strides.address(bad)
    if bad.stride(1) == 1:
        assert strides.address_of_rows(bad) == (bad.data_ptr(), 0)
    else:
        with pytest.raises(ValueError, match="rows of unit stride, got shape"):
            strides.address_of_rows(bad)
    assert strides.address(None) == 0
