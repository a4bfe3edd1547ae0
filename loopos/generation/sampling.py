"""How the next token is chosen, when a row stops, and the random numbers of each row."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from loopos.autograd import Array
from loopos.backends.random_bits import derive_key
from loopos.errors import ConfigError, nearest

__all__ = ["RowNumbers", "SamplingOptions", "SeenTokens", "with_overrides"]


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen and when a row stops.

    The options act in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes
    ----------
    max_new_tokens : int
        New tokens of a row at the most.
    temperature : float
        Divides the logits; 0 takes the most likely token, always.
    top_k : int
        Choose among the k most likely tokens; 0: among all.
    top_p : float
        Choose among the fewest tokens that have this share of the probability; 1: among all.
    min_p : float
        Leave out tokens with less than this multiple of the largest probability; 0: none.
    repetition_penalty : float
        Divides the positive logits of tokens that stand in the prompt or were generated, and
        multiplies the negative ones (Keskar et al. 2019); 1: nothing.
    stop : tuple of str
        Texts that end a row. The text is cut before them; the tokens up to the one that completes
        them are kept. One that is a special token, such as ``<|im_end|>``, is a stop token.
    stop_ids : tuple of int
        Tokens that end a row, beside the tokenizer's ends of text.
    ignore_eos : bool
        Let the tokenizer's ends of text pass as any other token.
    num_samples : int
        Rows of each prompt.
    seed : int
        Of the random numbers. A row's numbers follow from the seed, the index of its prompt and
        that of the sample, whatever else is generated.

    Raises
    ------
    ConfigError
        If a value does not fit, naming the option.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, smallest in (("max_new_tokens", 1), ("num_samples", 1), ("top_k", 0)):
            self._whole(name, lambda n, least=smallest: n >= least, f" of at least {smallest}")
        self._whole("seed", lambda _: True, "")
        self._number("temperature", lambda t: t >= 0, "a number of at least 0")
        self._number("top_p", lambda p: 0 < p <= 1, "a number in (0, 1]")
        self._number("min_p", lambda p: 0 <= p <= 1, "a number in [0, 1]")
        self._number("repetition_penalty", lambda p: p > 0, "a number above 0")
        self._require("ignore_eos", isinstance(self.ignore_eos, bool), "true or false")
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        texts = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        self._require("stop", texts, "a list of texts that are not empty")
        if isinstance(self.stop_ids, list):
            object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        ids = isinstance(self.stop_ids, tuple) and all(
            _is_whole(i) and i >= 0 for i in self.stop_ids
        )
        self._require("stop_ids", ids, "a list of token ids")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name}: expected {expected}, found {getattr(self, name)!r}")

    def _whole(self, name: str, fits: Any, expected: str) -> None:
        value = getattr(self, name)
        self._require(name, _is_whole(value) and fits(value), f"a whole number{expected}")
        object.__setattr__(self, name, int(value))

    def _number(self, name: str, fits: Any, expected: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
        try:
            found = float(value) if number else math.nan
        except OverflowError:  # a whole number can be of any size
            found = math.inf
        self._require(name, math.isfinite(found) and fits(found), expected)
        object.__setattr__(self, name, found)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def with_overrides(options: SamplingOptions | None, overrides: dict[str, Any]) -> SamplingOptions:
    """Return the options, some of them given anew.

    Raises
    ------
    ConfigError
        If there is no such option, or a value does not fit.
    """
    if options is not None and not isinstance(options, SamplingOptions):
        raise ConfigError(f"options: expected SamplingOptions, found {type(options).__name__}")
    known = [field.name for field in fields(SamplingOptions)]
    for name in overrides:
        if name not in known:
            raise ConfigError(f"no sampling option '{name}'{nearest(name, known)}")
    return replace(options or SamplingOptions(), **overrides)


class RowNumbers:
    """Uniform numbers of each slot's row: the n-th depends on the row and n alone.

    Philox (Salmon et al. 2011) is counter-based: a key names the row, a counter the step. Numbers
    are drawn in blocks, so that a step costs one look-up for all rows.

    Parameters
    ----------
    slots : int
        Rows at once.
    """

    _BLOCK = 64

    def __init__(self, slots: int):
        self._table = np.zeros((slots, self._BLOCK))
        self._rows: list[np.random.Generator | None] = [None] * slots
        self._steps = np.zeros(slots, np.int64)

    def start(self, slot: int, seed: int, prompt_index: int, sample_index: int) -> None:
        """Give a slot to a row."""
        key = derive_key(seed, prompt_index, sample_index)
        self._rows[slot] = np.random.Generator(np.random.Philox(key=key))
        self._steps[slot] = 0

    def next(self, slots: Array) -> Array:
        """Return the next number in [0, 1) of each slot, float64."""
        steps = self._steps[slots] % self._BLOCK
        if not steps.all():
            for slot in slots[steps == 0].tolist():
                row = self._rows[slot]
                assert row is not None
                self._table[slot] = row.random(self._BLOCK)
        self._steps[slots] += 1
        numbers: Array = self._table[slots, steps]
        return numbers


class SeenTokens:
    """The different tokens of each slot's row, for the repetition penalty.

    Parameters
    ----------
    slots : int
        Rows at once.
    penalty : float
    """

    def __init__(self, slots: int, penalty: float):
        self.penalty = penalty
        self._known: list[set[int]] = [set() for _ in range(slots)]
        self._ids = [np.zeros(0, np.int64) for _ in range(slots)]

    def start(self, slot: int, prompt: Array) -> None:
        """Give a slot to a row with that prompt."""
        unique = np.unique(prompt)
        self._known[slot] = set(unique.tolist())
        self._ids[slot] = np.concatenate([unique, np.zeros(64, np.int64)])

    def add(self, slot: int, token: int) -> None:
        """Count a token as seen."""
        known = self._known[slot]
        if token in known:
            return
        count = len(known)
        if count == self._ids[slot].size:
            self._ids[slot] = np.concatenate([self._ids[slot], np.zeros(count, np.int64)])
        self._ids[slot][count] = token
        known.add(token)

    def penalise(self, logits: Array, slots: Array) -> None:
        """Change the logits ``[B, V]`` of the rows in `slots`, in place."""
        penalty = logits.dtype.type(self.penalty)
        for row, slot in zip(logits, slots.tolist(), strict=True):
            ids = self._ids[slot][: len(self._known[slot])]
            found = row[ids]
            row[ids] = np.where(found < 0, found * penalty, found / penalty)
