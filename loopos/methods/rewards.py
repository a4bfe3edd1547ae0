"""Rewards: any Python callable, a reward model, or a weighted sum of several; and their scale."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from loopos.autograd import Array
from loopos.errors import ConfigError, LooposError, NumericalError, nearest
from loopos.methods.rollouts import Rollout
from loopos.models.reward import varies

__all__ = ["NORMALISATIONS", "Normaliser", "Reward"]

Normalisation = Literal["none", "mean", "mean_std", "running"]
NORMALISATIONS = ("none", "mean", "mean_std", "running")
#: What follows "reward/" in records already.
_TAKEN = ("score", "score_std", "total")


@dataclass(frozen=True)
class _Part:
    name: str
    weight: float
    function: Callable[..., Any]
    #: Which of "prompt_ids" and "response_ids" it takes as keywords.
    keywords: tuple[str, ...]


class Reward:
    """What scores responses, with its results checked.

    Parameters
    ----------
    reward : callable, object with ``score``, sequence of pairs, or mapping
        ``reward(prompts, responses) -> scores``, or its method ``score``, with a number for each
        response. With answers they are the third argument. Parameters of the names ``prompt_ids``
        and ``response_ids`` are given token ids too. A sequence of ``(reward, weight)``, or a
        mapping of names to such pairs, is a weighted sum.

    Raises
    ------
    ConfigError
        If it is none of these, or a part has the name of a figure of the sum.
    """

    def __init__(self, reward: Any):
        if isinstance(reward, Mapping):
            pairs = [(str(name), pair) for name, pair in reward.items()]
        elif isinstance(reward, Sequence) and not isinstance(reward, str):
            pairs = [(f"part_{index}", pair) for index, pair in enumerate(reward)]
        else:
            pairs = [("score", (reward, 1.0))]
        if not pairs:
            raise ConfigError("reward: expected at least one part")
        for name, _ in pairs if len(pairs) > 1 else ():
            if name in _TAKEN:
                raise ConfigError(f"reward '{name}': a part needs another name, this is the sum's")
        self._parts = [_part(name, pair) for name, pair in pairs]

    def __call__(self, rollout: Rollout) -> tuple[Array, dict[str, float]]:
        """Score every response.

        Returns
        -------
        scores : ndarray float64 [B]
        parts : dict of str to float
            Mean score of each part, as ``reward/<name>``; empty for a single one.

        Raises
        ------
        LooposError
            If a reward raises.
        ConfigError
            If it returns anything but a number for each response.
        NumericalError
            If a score is not finite, or their sum too large, naming the sample.
        """
        total = np.zeros(len(rollout))
        means = {}
        for part in self._parts:
            scores = _scores(part, rollout)
            with np.errstate(over="ignore", invalid="ignore"):  # it is told below
                total += part.weight * scores
            means[f"reward/{part.name}"] = float(scores.mean())
        bad = np.flatnonzero(~(np.abs(total) <= np.finfo(np.float32).max))
        if bad.size:
            raise NumericalError(
                f"the rewards come to {total[bad[0]]:g} for sample {int(rollout.samples[bad[0]])}, "
                f"more than float32 holds"
            )
        return total, means if len(self._parts) > 1 else {}


def _part(name: str, pair: Any) -> _Part:
    if not (isinstance(pair, Sequence) and len(pair) == 2):
        raise ConfigError(f"reward '{name}': expected a pair (reward, weight), found {pair!r}")
    reward, weight = pair
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight):
        raise ConfigError(f"reward '{name}': expected a number as weight, found {weight!r}")
    function = getattr(reward, "score", reward)
    if not callable(function):
        raise ConfigError(
            f"reward '{name}': expected a callable or an object with a method 'score', "
            f"found {type(reward).__name__}"
        )
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables of C have no signature
        known = {}  # type: ignore[assignment]
    keywords = tuple(k for k in ("prompt_ids", "response_ids") if k in known)
    return _Part(name, float(weight), function, keywords)


def _scores(part: _Part, rollout: Rollout) -> Array:
    """Ask one reward, and check what it says."""
    arguments: list[Any] = [list(rollout.prompts), list(rollout.texts)]
    if rollout.answers is not None:
        arguments.append(list(rollout.answers))
    starts, lengths = rollout.offsets[:-1], rollout.prompt_lengths
    ids = {
        "prompt_ids": lambda: [rollout.tokens[a : a + n].copy()
                               for a, n in zip(starts, lengths, strict=True)],
        "response_ids": lambda: np.split(rollout.targets.copy(), rollout.response_offsets[1:-1]),
    }  # fmt: skip
    try:
        given = part.function(*arguments, **{name: ids[name]() for name in part.keywords})
    except Exception as error:  # whatever the caller's code raises: it is named and chained
        raise LooposError(
            f"the reward '{part.name}' raised {type(error).__name__}: {error}"
        ) from error
    count = len(rollout)
    try:
        scores = np.asarray(given)
    except Exception as error:  # lists of different lengths, arrays that another library keeps
        raise ConfigError(
            f"the reward '{part.name}': expected {count} numbers, found {type(given).__name__} "
            f"({error})"
        ) from error
    if scores.shape != (count,) or scores.dtype.kind not in "fiub":
        found = f"{type(given).__name__} of shape {scores.shape} and type {scores.dtype}"
        raise ConfigError(
            f"the reward '{part.name}': expected {count} numbers, one a response, found {found}"
        )
    scores = scores.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise NumericalError(
            f"the reward '{part.name}' is {scores[bad[0]]} for sample "
            f"{int(rollout.samples[bad[0]])}"
        )
    return scores


@dataclass(frozen=True)
class Normaliser:
    """Shift and scale of scores, such that those of the reference have mean 0 (and deviation 1).

    Attributes
    ----------
    kind : {"none", "mean", "mean_std", "running"}
        "mean" removes the mean of the start's scores, "mean_std" also divides by their standard
        deviation; "running" does so with those of all scores up to now.
    count, mean, squares : float
        Scores seen, their mean, and the sum of their squared distances from it (Welford 1962).
    """

    kind: str = "none"
    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in NORMALISATIONS:
            raise ConfigError(
                f"training.reward_normalisation: expected one of {', '.join(NORMALISATIONS)}, "
                f"found {self.kind!r}{nearest(str(self.kind), NORMALISATIONS)}"
            )

    @property
    def calibrates(self) -> bool:
        """Whether it still has to see scores of the start."""
        return self.kind in ("mean", "mean_std") and not self.count

    def seen(self, scores: Array) -> Normaliser:
        """Return one that has seen these scores too."""
        n = scores.size
        mean = float(scores.mean())
        squares = float(((scores - mean) ** 2).sum())
        total = self.count + n
        shift = mean - self.mean
        return replace(
            self,
            count=float(total),
            mean=self.mean + shift * n / total,
            squares=self.squares + squares + shift * shift * self.count * n / total,
        )

    def apply(self, scores: Array) -> Array:
        """Return the scores on the new scale."""
        if self.kind == "none":
            return scores
        shifted: Array = scores - self.mean
        if self.kind == "mean":
            return shifted
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return shifted / deviation if varies(deviation, self.mean) else shifted
