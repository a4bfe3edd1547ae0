"""What the data holds and what is wrong with it, said before anything is trained."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loopos.data.labels import Problem
from loopos.data.readers import LabelledTexts, Texts
from loopos.data.store import first_of_each
from loopos.errors import DataError

__all__ = ["DataReport", "Finding"]

Array = np.ndarray[Any, Any]

_PLACES = 5
#: Classes that are listed, before it is said how many more there are.
_NAMES = 8
_WIDTH, _INDENT = 78, 15
#: A space where no line is broken.
_STUCK = "\N{NO-BREAK SPACE}"
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
    def of(cls, places: Sequence[str]) -> Finding:
        """Count `places`, keep the first few."""
        return cls(len(places), list(places[:_PLACES]))

    @classmethod
    def at(cls, found: Sequence[tuple[Texts, Array]]) -> Finding:
        """Count the rows at some indices of one set and the next, keep the first few places."""
        places: list[str] = []
        for data, indices in found:
            places += [data.where[i] for i in indices[: _PLACES - len(places)].tolist()]
        return cls(sum(int(indices.size) for _, indices in found), places)

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
    problem : {"classification", "regression", "multi_label"} or None
        None without labels.
    classes : dict of str to int
        Rows of each class or label of the training set, 0 for absent ones; empty without them.
    validation_classes : dict of str to int
    unlabelled, validation_unlabelled : int
        Rows without any label, where a row may have several; else 0.
    targets, validation_targets : dict of str to float
        Quantiles of the numbers to predict, of a regression; else empty.
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
        Rows whose text stands further up, in either set, with another label or target.
    leaks : Finding
        Validation rows whose text is in the training set.
    held_out : str
        Which part of the training text the validation text is, where it was the only one; else "".
    warnings : list of str
        What should be mended or known.
    """

    rows: int
    validation_rows: int
    problem: Problem | None
    classes: dict[str, int]
    validation_classes: dict[str, int]
    unlabelled: int
    validation_unlabelled: int
    targets: dict[str, float]
    validation_targets: dict[str, float]
    tokens: int
    lengths: dict[str, int]
    max_length: int | None
    truncated: Finding
    dropped: Finding
    duplicates: Finding
    conflicts: Finding
    leaks: Finding
    held_out: str
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
        _check_counts("lengths", training, lengths)
        _check_counts("validation_lengths", validation, validation_lengths)
        sets = [training] if validation is None else [training, validation]
        counted = [lengths, np.array([]) if validation_lengths is None else validation_lengths]
        long = [
            (data, np.flatnonzero(np.asarray(found) > (max_length or np.inf)))
            for data, found in zip(sets, counted, strict=False)
        ]
        # Where each text of both sets stands first, the training set's before the others.
        first = first_of_each(*(data.texts for data in sets))
        rows = len(training.texts)
        groups = np.split(first, [rows])[: len(sets)]
        outside = first[rows:]
        report = cls(
            rows=rows,
            validation_rows=outside.size,
            problem=training.problem if isinstance(training, LabelledTexts) else None,
            classes=_classes(training),
            validation_classes=_classes(validation),
            unlabelled=_unlabelled(training),
            validation_unlabelled=_unlabelled(validation),
            targets=_targets(training),
            validation_targets=_targets(validation),
            tokens=int(np.sum(lengths)),
            lengths={name: int(v) for name, v in _quantiles(lengths).items()},
            max_length=max_length,
            truncated=Finding.at(long),
            dropped=Finding(
                sum(len(data.dropped) for data in sets),
                [place for data in sets for place in data.dropped[:_PLACES]][:_PLACES],
            ),
            duplicates=Finding.at(
                [(data, _repeated(g)) for data, g in zip(sets, groups, strict=True)]
            ),
            conflicts=Finding.at(_conflicts(sets, groups)),
            leaks=Finding.at([(data, np.flatnonzero(outside < rows)) for data in sets[1:]]),
            held_out="" if validation is None else validation.held_out,
            warnings=[],
        )
        report.warnings.extend(report._warnings())
        return report

    def _warnings(self) -> list[str]:
        found = []
        kind = "label" if self.problem == "multi_label" else "class"
        for what, classes in (("row", self.classes), ("validation row", self.validation_classes)):
            absent = [name for name, count in classes.items() if not count]
            if absent:
                found.append(f"no {what} has the {kind} {_listed(absent, ' or ')}")
        present = [count for count in self.classes.values() if count]
        # Of several labels each is a question of its own: some may well be rare.
        if kind == "class" and present and max(present) > _IMBALANCE * min(present):
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
            others = {"regression": "target", "multi_label": "set of labels"}
            another = others.get(self.problem or "", "label")
            found.append(f"{self.conflicts.count} {repeat} a text with another {another}")
        if self.leaks.count:
            found.append(
                f"{self.leaks.count} of {self.validation_rows} validation texts stand in "
                "the training set too: the evaluation flatters the model"
            )
        return found

    def _label_lines(self) -> list[tuple[str, str]]:
        """Return the rows of the report that say what labels there are."""
        several = self.problem == "multi_label"
        sides = (
            ("labels" if several else "classes", self.rows, self.classes, self.unlabelled),
            ("  validation", self.validation_rows, self.validation_classes,
             self.validation_unlabelled),
        )  # fmt: skip
        table = []
        for name, rows, classes, unlabelled in sides:
            if classes:
                value = _listed(_balance(classes, rows), ", ")
                if several:
                    value += f"; no label {unlabelled} ({unlabelled / max(rows, 1):.0%})"
                table.append((name, value))
        for name, targets in (("targets", self.targets), ("  validation", self.validation_targets)):
            if targets:
                table.append((name, _figures(targets)))
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the report as lines of plain text, of 78 columns where words allow it."""
        table = [*self._table(), *(("warning:", text) for text in self.warnings)]
        return [line for name, value in table for line in _wrapped(name, value)]

    def _table(self) -> list[tuple[str, str]]:
        rows = f"{self.rows} training, {self.validation_rows} validation"
        lengths = _figures(self.lengths)
        table = [("rows", rows)]
        if self.held_out:
            table.append(("held out", self.held_out))
        table += self._label_lines()
        table += [("tokens", f"{self.tokens} ({lengths})")]
        if self.max_length is not None:
            table.append((f"cut to {self.max_length}", str(self.truncated)))
        for name in ("dropped", "duplicates", "conflicts", "leaks"):
            table.append((name, str(getattr(self, name))))
        return table


def _check_counts(name: str, data: Texts | None, lengths: Array | None) -> None:
    if data is not None and lengths is not None and len(lengths) != len(data.texts):
        raise DataError(f"{name}: expected {len(data.texts)}, one a text, found {len(lengths)}")


def _quantiles(values: Array) -> dict[str, Any]:
    """Return some quantiles, each a value that occurs."""
    levels = np.percentile(values, list(_QUANTILES.values()), method="nearest")
    return dict(zip(_QUANTILES, levels.tolist(), strict=True))


def _targets(data: Texts | None) -> dict[str, float]:
    if not isinstance(data, LabelledTexts) or data.problem != "regression" or not data.labels.size:
        return {}
    return {name: float(value) for name, value in _quantiles(data.labels).items()}


def _classes(data: Texts | None) -> dict[str, int]:
    if not isinstance(data, LabelledTexts) or data.problem == "regression":
        return {}
    if data.problem == "multi_label":
        counts = data.labels.sum(axis=0, dtype=np.int64)
    else:
        counts = np.bincount(data.labels, minlength=len(data.label_names))
    return {name: int(count) for name, count in zip(data.label_names, counts, strict=True)}


def _unlabelled(data: Texts | None) -> int:
    if not isinstance(data, LabelledTexts) or data.problem != "multi_label":
        return 0
    return int((~data.labels.any(axis=1)).sum())


def _balance(classes: dict[str, int], rows: int) -> list[str]:
    shown = sorted(classes.items(), key=lambda item: -item[1])
    return [f"{name} {count} ({count / max(rows, 1):.0%})" for name, count in shown]


def _listed(names: list[str], last: str) -> str:
    """Join `names`, the first few and how many more."""
    if len(names) > _NAMES:
        return f"{', '.join(names[:_NAMES])} and {len(names) - _NAMES} more"
    return last.join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _figures(values: Mapping[str, float]) -> str:
    """Join names and numbers, each pair in one line."""
    shown = {name: v if isinstance(v, int) else f"{v:.6g}" for name, v in values.items()}
    return ", ".join(f"{name}{_STUCK}{value}" for name, value in shown.items())


def _wrapped(name: str, value: str) -> list[str]:
    """Return a row of the report, its value in a column of its own."""
    lines = textwrap.wrap(value, _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False)
    lines = [line.replace(_STUCK, " ") for line in lines]
    return [f"{name if not i else '':<{_INDENT}}{line}" for i, line in enumerate(lines)]


def _leaders(groups: Array) -> Array:
    """Return for each row the first one of its group."""
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    return first[group_of]


def _repeated(groups: Array) -> Array:
    """Return which rows have one of their group further up."""
    return np.flatnonzero(_leaders(groups) < np.arange(groups.size))


def _conflicts(sets: list[Texts], groups: list[Array]) -> list[tuple[Texts, Array]]:
    """Return which rows have one of their group further up, in either set, labelled otherwise."""
    pairs = [(d, g) for d, g in zip(sets, groups, strict=True) if isinstance(d, LabelledTexts)]
    labelled = [data for data, _ in pairs]
    if not labelled:
        return []
    if len({data.problem for data in labelled}) > 1:
        raise DataError(
            f"the training data is for {labelled[0].problem}, "
            f"the validation data for {labelled[1].problem}"
        )
    names = list(dict.fromkeys(name for data in labelled for name in data.label_names))
    labels = np.concatenate([data.with_label_names(names).labels for data in labelled])
    other = labels[_leaders(np.concatenate([group for _, group in pairs]))] != labels
    wrong = other.any(axis=1) if other.ndim > 1 else other
    parts = np.split(wrong, [len(labelled[0].texts)])
    return [(data, np.flatnonzero(part)) for data, part in zip(labelled, parts, strict=False)]
