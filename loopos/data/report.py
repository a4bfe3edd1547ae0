"""What the data holds and what is wrong with it, said before anything is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loopos.data.readers import LabelledTexts, Texts

__all__ = ["DataReport", "Finding"]

Array = np.ndarray[Any, Any]

_PLACES = 5
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
        more = ", ..." if self.count > len(self.places) else ""
        return f"{self.count} ({', '.join(self.places)}{more})"


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
        Training texts over `max_length`.
    dropped : Finding
        Rows without any text, left out.
    duplicates : Finding
        Training rows whose text stands further up.
    conflicts : Finding
        Among them, those with another label.
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
    ) -> DataReport:
        """Look through the data.

        Parameters
        ----------
        training, validation : Texts or LabelledTexts
        lengths : ndarray of int [n]
            Tokens of each training text before truncation.
        max_length : int or None
            Where texts are cut.
        """
        long = [] if max_length is None else np.flatnonzero(lengths > max_length).tolist()
        duplicates, conflicts = _duplicates(training)
        seen = set(training.texts)
        leaks = [
            place
            for text, place in zip(validation.texts, validation.where, strict=True)
            if text in seen
        ] if validation is not None else []  # fmt: skip
        levels = np.percentile(lengths, list(_QUANTILES.values()), method="nearest")
        report = cls(
            rows=len(training.texts),
            validation_rows=0 if validation is None else len(validation.texts),
            classes=_classes(training),
            validation_classes={} if validation is None else _classes(validation),
            tokens=int(lengths.sum()),
            lengths={name: int(v) for name, v in zip(_QUANTILES, levels, strict=True)},
            max_length=max_length,
            truncated=Finding.of([training.where[i] for i in long]),
            dropped=Finding.of(
                [*training.dropped, *([] if validation is None else validation.dropped)]
            ),
            duplicates=Finding.of(duplicates),
            conflicts=Finding.of(conflicts),
            leaks=Finding.of(leaks),
            warnings=[],
        )
        report.warnings.extend(report._warnings())
        return report

    def _warnings(self) -> list[str]:
        found = []
        absent = [name for name, count in self.classes.items() if not count]
        present = [count for count in self.classes.values() if count]
        if absent:
            found.append(f"no row has the class {', '.join(absent)}")
        if present and max(present) > _IMBALANCE * min(present):
            found.append(
                f"the classes are out of balance, {max(present)} rows to {min(present)}: "
                "consider class_weights 'balanced'"
            )
        if self.truncated.count > _TRUNCATED * self.rows:
            share = self.truncated.count / self.rows
            found.append(f"{share:.0%} of the texts are cut to {self.max_length} tokens")
        if self.conflicts.count:
            found.append(f"{self.conflicts.count} texts stand there twice with different labels")
        if self.leaks.count:
            found.append(
                f"{self.leaks.count} validation texts are in the training set: "
                "the evaluation flatters the model"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the report as lines of plain text."""
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
        lines = [f"{name:<14} {value}" for name, value in table]
        return lines + [f"warning: {text}" for text in self.warnings]


def _classes(data: Texts) -> dict[str, int]:
    if not isinstance(data, LabelledTexts):
        return {}
    counts = np.bincount(data.labels, minlength=len(data.label_names))
    return {name: int(count) for name, count in zip(data.label_names, counts, strict=True)}


def _balance(classes: dict[str, int]) -> str:
    total = sum(classes.values())
    shown = sorted(classes.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name} {count} ({count / total:.0%})" for name, count in shown[:8])
    return text + (f", and {len(shown) - 8} more" if len(shown) > 8 else "")


def _duplicates(data: Texts) -> tuple[list[str], list[str]]:
    """Return where texts stand again, and where they do with another label."""
    repeated = {text for text, count in Counter(data.texts).items() if count > 1}
    labels = data.labels if isinstance(data, LabelledTexts) else np.zeros(len(data.texts), int)
    first: dict[str, int] = {}
    again, conflicts = [], []
    for index, text in enumerate(data.texts):
        if text not in repeated:
            continue
        if text not in first:
            first[text] = index
            continue
        again.append(data.where[index])
        if labels[index] != labels[first[text]]:
            conflicts.append(data.where[index])
    return again, conflicts
