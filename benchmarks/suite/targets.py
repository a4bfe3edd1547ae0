"""The targets of `targets.json`, and what was measured held against them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import limits
from .machine import Machine

PATH = Path(__file__).parents[1] / "targets.json"
Row = dict[str, Any]
#: The keys of a target that choose rows; all others say what the figure should be.
_CHOOSES = ("work", "backend", "peer", "buckets", "dtype")


@dataclass(frozen=True)
class Target:
    """One figure that rows should reach.

    Attributes
    ----------
    figure : str
        Key of the row.
    bound : float
        What it should reach.
    smaller_is_better : bool
        Whether `bound` is the most or the least.
    chooses : dict
        Keys and values of the rows meant; `work` may have a ``*``.
    source : str
        Where the target comes from.
    """

    figure: str
    bound: float
    smaller_is_better: bool
    chooses: dict[str, Any]
    source: str

    def meant(self, row: Row) -> bool:
        """Say whether the target is about this row."""
        return row.get(self.figure) is not None and all(
            fnmatchcase(row["work"], value) if key == "work" else row.get(key, False) == value
            for key, value in self.chooses.items()
        )

    def multiple(self, row: Row) -> float:
        """Return the figure as a multiple of the target, at most 1 where it is met."""
        value = float(row[self.figure])
        if self.smaller_is_better:
            return value / self.bound
        return self.bound / value if value > 0 else float("inf")

    def __str__(self) -> str:
        word = "at most" if self.smaller_is_better else "at least"
        return f"{word} {self.bound:g}"


def load(path: Path = PATH) -> list[Target]:
    """Read the targets."""
    return [_target(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["targets"]]


def _target(entry: dict[str, Any]) -> Target:
    smaller = "at_most" in entry
    return Target(
        figure=entry["figure"],
        bound=float(entry["at_most" if smaller else "at_least"]),
        smaller_is_better=smaller,
        chooses={key: entry[key] for key in _CHOOSES if key in entry},
        source=entry["source"],
    )


def add_backend_ratios(rows: Iterable[Row]) -> list[Row]:
    """Give every row `times_numpy`: how many times faster than the numpy backend it is."""
    rows = list(rows)
    reference = {row["work"]: row["loopos_s"] for row in rows if row["backend"] == "numpy"}
    return [
        row | {"times_numpy": reference[row["work"]] / row["loopos_s"]}
        if row["work"] in reference and row["backend"] != "numpy"
        else dict(row)
        for row in rows
    ]


def add_context_ratios(rows: Iterable[Row]) -> list[Row]:
    """Give decoding with a long context `times_short`: how much dearer a token is than with 32."""
    rows = list(rows)
    keys = ("backend", "dtype")
    short = {tuple(row[k] for k in keys): row["loopos_s"] for row in rows if row["work"] == "F"}
    return [
        row | {"times_short": row["loopos_s"] / short[key]}
        if row["work"] == "F-long" and (key := tuple(row[k] for k in keys)) in short
        else dict(row)
        for row in rows
    ]


def add_ragged_ratios(rows: Iterable[Row]) -> list[Row]:
    """Give a step with ragged responses `times_even`: how much dearer a token is than in E."""
    rows = list(rows)
    even = {
        row["backend"]: row["loopos_s"] / row["tokens"]
        for row in rows
        if row["work"] == "E" and row.get("tokens")
    }
    return [
        row | {"times_even": row["loopos_s"] / row["tokens"] / even[row["backend"]]}
        if row["work"] == "E-ragged" and row.get("tokens") and row["backend"] in even
        else dict(row)
        for row in rows
    ]


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """Give rows what comes of comparing them with each other."""
    return add_ragged_ratios(add_context_ratios(add_backend_ratios(rows)))


def seconds(work: str, backend: str, machine: Machine | None = None) -> float | None:
    """Return the time that a backend should take for a work, by its strictest target, or None.

    A target that is a fraction of the limit needs the measured `machine`.
    """
    found = []
    for target in load():
        about = {"work": work, "backend": backend, target.figure: 1.0}
        if not target.meant(about):
            continue
        if target.figure == "loopos_s":
            found.append(target.bound)
        elif target.figure == "fraction_of_limit":
            limit = limits.seconds(work, machine)
            if limit is not None:
                found.append(limit / target.bound)
    return min(found, default=None)
