"""What the data holds and what is wrong with it, said before anything is trained."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loopos.data.readers import LabelledTexts, Texts
from loopos.errors import DataError

__all__ = ["DataReport", "Finding"]

Array = np.ndarray[Any, Any]

_PLACES = 5
#: Classes that are listed, before it is said how many more there are.
_NAMES = 8
_WIDTH, _INDENT = 78, 15
_QUANTILES = {"min": 0, "5%": 5, "25%": 25, "median": 50, "75%": 75, "95%": 95, "max": 100}
#: The most frequent class over the rarest: beyond this it is said.
_IMBALANCE = 10.0
#: Share of truncated texts: beyond this it is said.
_TRUNCATED = 0.1


@dataclass(frozen=True)
class Finding:
    """Rows that deserve a look: how many, and where the first ones stand."""

    count: int
    places: list[str]

    @classmethod
    def of(cls, places: list[str]) -> Finding:
        """Count `places`, keep the first few."""
        return cls(len(places), places[:_PLACES])

    def __str__(self) -> str:
        if not self.count:
            return "none"
        shown, file = [], None
        for place in self.places:
            # Of places in one file only the first one names it.
            name, colon, line = place.rpartition(":")
            shown.append(f":{line}" if colon and name == file else place)
            file = name
        more = ", ..." if self.count > len(self.places) else ""
        return f"{self.count} ({', '.join(shown)}{more})"


@dataclass(frozen=True)
class DataReport:
    """What a training set (and its validation set) holds.

    Attributes
    ----------
    rows, validation_rows : int
    classes : dict of str to int
        Rows of each class of the training set, 0 for absent ones; empty without labels.
    validation_classes : dict of str to int
    tokens : int
        Of the training set, before truncation.
    lengths : dict of str to int
        Quantiles of the tokens of a training text.
    max_length : int or None
        Where texts are cut.
    truncated : Finding
        Texts over `max_length`, of the training and then of the validation set.
    dropped : Finding
        Rows without any text, left out; of both sets.
    duplicates : Finding
        Rows whose text stands further up in the same set; of both sets.
    conflicts : Finding
        Rows whose text stands further up, in either set, with another label.
    leaks : Finding
        Validation rows whose text is in the training set.
    warnings : list of str
        What should be mended or known.
    """

    rows: int
    validation_rows: int
    classes: dict[str, int]
    validation_classes: dict[str, int]
    tokens: int
    lengths: dict[str, int]
    max_length: int | None
    truncated: Finding
    dropped: Finding
    duplicates: Finding
    conflicts: Finding
    leaks: Finding
    warnings: list[str]

    @classmethod
    def build(
        cls,
        training: Texts,
        validation: Texts | None,
        lengths: Array,
        max_length: int | None,
        validation_lengths: Array | None = None,
    ) -> DataReport:
        """Look through the data.

        Parameters
        ----------
        training, validation : Texts or LabelledTexts
            With the same label names.
        lengths : ndarray of int [n]
            Tokens of each training text before truncation.
        max_length : int or None
            Where texts are cut.
        validation_lengths : ndarray of int [m], optional
            Tokens of each validation text; without them its truncated texts are not reported.

        Raises
        ------
        DataError
            If there is no training text, or not one length for each text.
        """
        if not training.texts:
            raise DataError("there is no text to train on")
        given = {
            "lengths": (training, lengths),
            "validation_lengths": (validation, validation_lengths),
        }
        for name, (data, found) in given.items():
            if data is not None and found is not None and len(found) != len(data.texts):
                raise DataError(
                    f"{name}: expected {len(data.texts)}, one a text, found {len(found)}"
                )
        both = [(training, lengths)]
        if validation is not None:
            both.append((validation, np.array([]) if validation_lengths is None
                         else validation_lengths))  # fmt: skip
        long = [
            data.where[i]
            for data, found in both
            for i in np.flatnonzero(np.asarray(found) > (max_length or np.inf)).tolist()
        ]
        seen = set(training.texts)
        leaks = [] if validation is None else _places(validation, lambda text: text in seen)
        levels = np.percentile(lengths, list(_QUANTILES.values()), method="nearest")
        report = cls(
            rows=len(training.texts),
            validation_rows=0 if validation is None else len(validation.texts),
            classes=_classes(training),
            validation_classes={} if validation is None else _classes(validation),
            tokens=int(np.sum(lengths)),
            lengths={name: int(v) for name, v in zip(_QUANTILES, levels, strict=True)},
            max_length=max_length,
            truncated=Finding.of(long),
            dropped=Finding.of([place for data, _ in both for place in data.dropped]),
            duplicates=Finding.of([place for data, _ in both for place in _duplicates(data)]),
            conflicts=Finding.of(_conflicts([data for data, _ in both])),
            leaks=Finding.of(leaks),
            warnings=[],
        )
        report.warnings.extend(report._warnings())
        return report

    def _warnings(self) -> list[str]:
        found = []
        for what, classes in (("row", self.classes), ("validation row", self.validation_classes)):
            absent = [name for name, count in classes.items() if not count]
            if absent:
                found.append(f"no {what} has the class {_listed(absent, ' or ')}")
        present = [count for count in self.classes.values() if count]
        if present and max(present) > _IMBALANCE * min(present):
            found.append(
                f"the classes are out of balance, {max(present)} rows to {min(present)}: "
                "consider class_weights 'balanced'"
            )
        rows = self.rows + self.validation_rows
        if self.truncated.count > _TRUNCATED * rows:
            share = self.truncated.count / rows
            found.append(f"{share:.0%} of the texts are cut to {self.max_length} tokens")
        if self.conflicts.count:
            repeat = "row repeats" if self.conflicts.count == 1 else "rows repeat"
            found.append(f"{self.conflicts.count} {repeat} a text with another label")
        if self.leaks.count:
            found.append(
                f"{self.leaks.count} of {self.validation_rows} validation texts stand in "
                "the training set too: the evaluation flatters the model"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the report as lines of plain text, of 78 columns where words allow it."""
        rows = f"{self.rows} training, {self.validation_rows} validation"
        lengths = ", ".join(f"{name} {value}" for name, value in self.lengths.items())
        table = [("rows", rows)]
        if self.classes:
            table.append(("classes", _balance(self.classes)))
        if self.validation_classes:
            table.append(("  validation", _balance(self.validation_classes)))
        table += [("tokens", f"{self.tokens} ({lengths})")]
        if self.max_length is not None:
            table.append((f"cut to {self.max_length}", str(self.truncated)))
        for name in ("dropped", "duplicates", "conflicts", "leaks"):
            table.append((name, str(getattr(self, name))))
        table += [("warning:", text) for text in self.warnings]
        return [line for name, value in table for line in _wrapped(name, value)]


def _classes(data: Texts) -> dict[str, int]:
    if not isinstance(data, LabelledTexts):
        return {}
    counts = np.bincount(data.labels, minlength=len(data.label_names))
    return {name: int(count) for name, count in zip(data.label_names, counts, strict=True)}


def _balance(classes: dict[str, int]) -> str:
    total = max(sum(classes.values()), 1)
    shown = sorted(classes.items(), key=lambda item: -item[1])
    return _listed([f"{name} {count} ({count / total:.0%})" for name, count in shown], ", ")


def _listed(names: list[str], last: str) -> str:
    """Join `names`, the first few and how many more."""
    if len(names) > _NAMES:
        return f"{', '.join(names[:_NAMES])} and {len(names) - _NAMES} more"
    return last.join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _wrapped(name: str, value: str) -> list[str]:
    """Return a row of the report, its value in a column of its own."""
    lines = textwrap.wrap(value, _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False)
    return [f"{name if not i else '':<{_INDENT}}{line}" for i, line in enumerate(lines)]


def _places(data: Texts, wanted: Callable[[str], bool]) -> list[str]:
    return [place for text, place in zip(data.texts, data.where, strict=True) if wanted(text)]


def _duplicates(data: Texts) -> list[str]:
    """Return where texts stand again."""
    seen: set[str] = set()

    def again(text: str) -> bool:
        known = text in seen
        seen.add(text)
        return known

    return _places(data, again)


def _conflicts(sets: list[Texts]) -> list[str]:
    """Return where texts stand again with another label than the first time."""
    first: dict[str, str] = {}
    found = []
    for data in sets:
        if isinstance(data, LabelledTexts):
            for text, label, place in zip(data.texts, data.labels, data.where, strict=True):
                name = data.label_names[label]
                if first.setdefault(text, name) != name:
                    found.append(place)
    return found
