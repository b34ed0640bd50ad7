"""Text of tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What a decoder of text puts for bytes that are no character, or no whole one yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns tokens into text, piece by piece.

    Text is held back while it may still change or be the beginning of a stop string. A stop string, wherever tokens
    divide it, ends the text in front of it.

    Args:
        decode: the text of tokens, as `tokenizer.decode`.
        stop: strings that end the text.

    Attributes:
        text: all text so far, without what is held back.
        stopped: whether a stop string has ended the text.

    Raises:
        ValueError: a stop string is empty.

    Example:
        >>> stream = TextStream(tokenizer.decode, stop=("\\n\\n",))
        >>> for token in runner.generate(ids, 100):
        ...     print(stream.add(token), end="")
        ...     if stream.stopped:
        ...         break
        >>> print(stream.finish())
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        self._held = ""
        # Tokens in front of `_read` are in the text; those from `_context` on are decoded with the next ones, as the
        # first token of a text may lose the space in front of it.
        self._tokens: list[int] = []
        self._context = self._read = 0

    def add(self, token: int) -> str:
        """The text that a token adds.

        Raises:
            RuntimeError: the text has ended.
        """
        if self.stopped:
            raise RuntimeError("a stop string has ended the text")
        self._tokens.append(token)
        piece = self._piece()
        if piece.endswith(_INCOMPLETE):
            return ""
        return self._release(self._take(piece), more=True)

    def finish(self) -> str:
        """The text that was held back; no token may follow."""
        if self.stopped:
            return ""
        return self._release(self._take(self._piece()), more=False)

    def _piece(self) -> str:
        known = self._decode(self._tokens[self._context : self._read])
        return self._decode(self._tokens[self._context :])[len(known) :]

    def _take(self, piece: str) -> str:
        if piece:
            self._context, self._read = self._read, len(self._tokens)
        return piece

    def _release(self, piece: str, *, more: bool) -> str:
        text = self._held + piece
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, text, held = True, text[: min(found)], 0
        else:
            held = self._begun(text) if more else 0
        self._held = text[len(text) - held :]
        text = text[: len(text) - held]
        self.text += text
        return text

    def _begun(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:length])
            ),
            default=0,
        )
