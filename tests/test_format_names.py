"""The grammar of names: what suffixes say of int8 activations, and names that are made."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lowbit import format_names
from lowbit.formats import FORMATS, Format, parse


@pytest.mark.parametrize(
    ("name", "activation", "group"),
    [
        ("int4_g32_a8", "int8", None),
        ("int4_g32_a8b32", "int8", 32),
        ("int4_a8b256_g32", "int8", 256),
        ("nf4_a8tb128", "int8_table", 128),
        ("int8_row_a8b7", "int8", 7),
        ("q4_k_a8b32", "int8", 32),
        ("int4_g32_o3_a8b32", "int8", 32),
        ("nf4_g32_int8_a8tb64", "int8_table", 64),
    ],
)
def test_activations(name, activation, group):
    format = parse(name)
    assert (format.activation, format.activation_group) == (activation, group)
    assert format.spec == name
    assert parse(json.dumps(dataclasses.asdict(format))) == format
    plain = format.with_activation(None)
    assert plain == dataclasses.replace(
        format, name=plain.name, activation=None, activation_group=None
    )
    assert "a8" not in plain.name
    again = plain.with_activation(activation, group)
    assert dataclasses.replace(again, name=name) == format
    assert parse(again.spec) == again
    assert format.num_blocks(300) == (1 if group is None else -(-300 // group))


@pytest.mark.parametrize("name", FORMATS)
def test_made_names_are_read_back(name):
    format = FORMATS[name]
    kind = "int8" if format.int8_step is not None else "int8_table"
    if format.table_scope != "tensor":
        with pytest.raises(ValueError, match="table_scope"):
            format.with_activation(kind, 32)
        return
    made = format.with_activation(kind, format.group)
    assert parse(made.name) == made
    assert made.with_activation(None) == format


def test_a_spec_of_before_has_no_blocks():
    fields = dataclasses.asdict(parse("int4_g32_a8"))
    del fields["activation_group"]
    assert parse(json.dumps(fields)) == parse("int4_g32_a8")


def test_what_is_refused():
    for name, message in (
        (
            "int4_g48_a8b32",
            r"activation_group must be a multiple of the group \(48\), or divide it, got 32",
        ),
        ("int4_g32_a8b48", "activation_group must be a multiple of the group"),
        ("int4_g32_a8b0", "activation_group must be a positive integer below 2"),
        ("int4_a8b32_a8", "gives its activation twice"),
        ("nf4_a8b32", "not exact in int8.*_a8t"),
        ("int4_a8b", "unknown format 'int4_a8b'"),
        ("int4_b32", "unknown format"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(name)
    with pytest.raises(ValueError, match="activation_group must be None without int8 activations"):
        Format.lut(bits=4, activation_group=32)
    with pytest.raises(ValueError, match="activation_group must be a positive integer"):
        Format.lut(bits=4, activation="int8_table", activation_group=True)


def test_words():
    assert format_names.activation_of("int8") == ("int8", None)
    assert format_names.activation_of("int8_table_b32") == ("int8_table", 32)
    for word in ("", "int8_", "int8_b", "a8", "int8_b32 ", "int8_bb", "INT8"):
        with pytest.raises(ValueError, match="activations must be int8 or int8_table"):
            format_names.activation_of(word)
