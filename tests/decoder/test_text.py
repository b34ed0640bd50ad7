"""Pieces of text and stop strings, against the text of all tokens at once."""

from __future__ import annotations

import random

import pytest

from lowbit.decoder.text import TextStream


def utf8(tokens):
    """Each token a byte."""
    return bytes(tokens).decode(errors="replace")


def words(tokens):
    """Each token a word behind a space, which the first one of a text loses."""
    return "".join(f" {chr(97 + t)}" for t in tokens).removeprefix(" ")


def streamed(tokens, decode, stop=()):
    stream = TextStream(decode, stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token))
        assert stream.text == "".join(pieces)
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return pieces


def test_characters_come_when_they_are_whole():
    assert streamed("aé€😀".encode(), utf8) == [
        "a", "", "é", "", "", "€", "", "", "", "😀", "",
    ]  # fmt: skip


def test_spaces_between_tokens():
    assert streamed([0, 1, 2], words) == ["a", " b", " c", ""]


def test_bytes_that_are_no_character_come_at_the_end():
    assert streamed([97, 0xF0, 0x9F], utf8) == ["a", "", "", "\ufffd"]


def test_a_stop_string_ends_the_text():
    pieces = streamed(b"one END two", utf8, ("END", "two"))
    assert pieces == ["o", "n", "e", " ", "", "", "", ""]


def test_the_beginning_of_a_stop_string_is_held_back():
    assert streamed(b"aabaaac", utf8, ("aaac",)) == ["", "", "aab", "", "", "", "", ""]
    assert streamed(b"aabaa", utf8, ("aaac",)) == ["", "", "aab", "", "", "aa"]


def test_a_stop_string_inside_a_token():
    stream = TextStream(lambda tokens: "".join(["x. y", "z"][t] for t in tokens), (". ",))
    assert stream.add(0) == "x"
    assert stream.stopped
    with pytest.raises(RuntimeError, match="has ended the text"):
        stream.add(1)


def test_random_texts():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab€😀", k=30))
        stop = [text[at : at + rng.randint(1, 4)] for at in rng.choices(range(26), k=2)]
        stop.append("".join(rng.choices("ab€", k=3)))
        stop = stop[: rng.randint(0, 3)]
        ends = [text.find(s) for s in stop if s in text]
        got = "".join(streamed(text.encode(), utf8, stop))
        # Of stop strings that end in the same text, the one that is whole first counts.
        first = min((text.find(s) + len(s) for s in stop if s in text), default=None)
        if first is None:
            assert got == text
        else:
            assert got in {text[:end] for end in ends}
            assert not any(s in got for s in stop)
            assert len(got) < first


def test_empty_stop_strings():
    with pytest.raises(ValueError, match="a stop string must not be empty"):
        TextStream(utf8, ("a", ""))
