"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterable

from loopos.data.tokenizer import Tokenizer

__all__ = ["TextTail"]

#: Tokens decoded at a time: a longer window is cut to its last ones.
_WINDOW, _KEPT = 24, 6
#: After so many tokens bytes that are no text are taken as they are.
_LONGEST_WINDOW = 96
#: What bytes that are no text, or not yet, decode to.
_UNKNOWN = "\ufffd"


class TextTail:
    """The text of a growing list of tokens, each decoded together with those just before it only.

    Parameters
    ----------
    tokenizer : Tokenizer
        Special tokens are left out of the text.
    stop : iterable of str
        Texts that end the row.

    Attributes
    ----------
    stopped : bool
        Whether a stop string was found; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._window: list[int] = []
        self._taken = 0  # characters of the window's text that were taken
        self._parts: list[str] = []
        self._tail = ""  # the last characters, where a stop string may have begun
        self._pending = ""  # what was not released
        self.stopped = False

    @property
    def text(self) -> str:
        """What is certain: no unfinished character, no stop string."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, token: int) -> bool:
        """Add a token; return whether it completed a stop string."""
        window = self._window
        window.append(token)
        text = self._decode(window)
        certain = len(text) if len(window) > _LONGEST_WINDOW else len(text.rstrip(_UNKNOWN))
        self._take(text, certain)
        if len(window) > _WINDOW and certain == len(text):
            kept = self._decode(window[-_KEPT:])
            # Not within a character, which would change what follows.
            if len(window) > _LONGEST_WINDOW or (_UNKNOWN not in kept and text.endswith(kept)):
                del window[:-_KEPT]
                self._taken = len(kept)
        return self.stopped

    def finish(self) -> bool:
        """Take what is left as it is; return whether it completed a stop string."""
        text = self._decode(self._window)
        self._take(text, len(text))
        return self.stopped

    def release(self, last: bool = False) -> str:
        """Return what became certain since the last call; with `last`, all that is left.

        What may be the beginning of a stop string is held back until it is known.
        """
        end = len(self._pending) - (0 if last or self.stopped else self._held())
        piece, self._pending = self._pending[:end], self._pending[end:]
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _take(self, text: str, certain: int) -> None:
        """Add the window's text up to a character, if that is more than was taken."""
        if certain <= self._taken or self.stopped:
            return
        piece, self._taken = text[self._taken : certain], certain
        self._parts.append(piece)
        self._pending += piece
        searched = self._tail + piece
        hits = [at for at in map(searched.find, self._stop) if at >= 0]
        if hits:
            surplus = len(searched) - min(hits)
            self._parts = [self.text[:-surplus]]
            self._pending = self._pending[:-surplus]
            self.stopped = True
        elif self._stop:
            self._tail = searched[max(0, len(searched) - self._longest + 1) :]

    def _held(self) -> int:
        """Return how many of the last characters may belong to a stop string."""
        for size in range(len(self._tail), 0, -1):
            if any(s.startswith(self._tail[-size:]) for s in self._stop):
                return size
        return 0
