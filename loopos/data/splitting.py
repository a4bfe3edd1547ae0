"""Splitting rows into training and validation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loopos.data.store import TextStore, first_of_each
from loopos.errors import DataError

if TYPE_CHECKING:
    from loopos.data.readers import Texts

__all__ = ["split"]

Array = np.ndarray[Any, Any]


def _share(sizes: Array, fraction: float) -> Array:
    """Return which groups have about `fraction` of the rows: one at least, and never all, of two.

    Parameters
    ----------
    sizes : ndarray int64 [g]
        Rows of each group, in the order in which they are considered.

    Returns
    -------
    ndarray bool [g]
    """
    taken = np.zeros(sizes.size, dtype=bool)
    if sizes.size < 2:
        return taken
    wanted = int(fraction * int(sizes.sum()) + 0.5)
    rows = 0
    for group, size in enumerate(sizes.tolist()):
        if rows + size <= wanted:
            taken[group] = True
            rows += size
    smallest = int(np.argmin(sizes))
    if not taken.any():
        taken[smallest] = True
    elif taken.all():
        taken[smallest] = False
    return taken


def _are_plain(data: Texts) -> bool:
    """Whether these are texts and nothing more: part of one is a text as well."""
    from loopos.data.readers import Texts  # which has split() in its namespace

    return type(data) is Texts


def _with_ends_held_out(data: Texts, fraction: float) -> tuple[Any, Any]:
    """Return equal texts (one, mostly) without their ends, and the ends."""
    texts = data.texts if isinstance(data.texts, TextStore) else TextStore.of(data.texts)
    sides = texts.without_ends(fraction)
    if sides is None:
        raise DataError(f"the text is too short to hold out a validation fraction of {fraction}")
    held, whole = sides[1].size_bytes, texts.size_bytes
    what = (
        "the end of the only text" if len(texts) == 1 else f"the ends of {len(texts)} equal texts"
    )
    told = f"{what}, {held:,} of {whole:,} bytes ({held / whole:.1%})"
    return replace(data, texts=sides[0]), replace(data, texts=sides[1], dropped=[], held_out=told)


def split(data: Texts, fraction: float, seed: int) -> tuple[Any, Any]:
    """Divide rows into training and validation, seeded, stratified by class, without leaks.

    Rows with the same text stay on one side. Of each class about `fraction` of the rows go to
    validation: at least one and never all, where it has two different texts or more. A text with
    several classes counts for its first. Where a row has a number or several labels, or none at
    all, all rows are treated as one class.

    Of plain texts (:class:`loopos.data.readers.Texts` itself) one is enough: there is no other to
    hold out, so its end is, the last `fraction` of it, cut at the end of a line if one is near.
    ``validation.held_out`` says so.

    Parameters
    ----------
    data : Texts or LabelledTexts
    fraction : float
        Share of validation, in (0, 1).
    seed : int

    Returns
    -------
    training, validation
        Of the class of `data`, rows in their order.

    Raises
    ------
    DataError
        If nothing would be left on one side.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"expected a validation fraction between 0 and 1, found {fraction}")
    rng = np.random.default_rng(seed)
    # Each row belongs to the group of the first row with its text.
    group_of = first_of_each(data.texts)
    groups, sizes = np.unique(group_of, return_counts=True)
    if groups.size == 1 and _are_plain(data):
        return _with_ends_held_out(data, fraction)
    labels = np.zeros(group_of.size, np.int64)
    if getattr(data, "problem", None) == "classification":
        labels = data.labels  # type: ignore[attr-defined]
    class_of = labels[groups]
    held_out = np.zeros(group_of.size, dtype=bool)  # by the first row of a group
    for label in np.unique(class_of):
        members = np.flatnonzero(class_of == label)
        order = members[rng.permutation(members.size)]
        held_out[groups[order[_share(sizes[order], fraction)]]] = True
    outside = held_out[group_of]
    if not outside.any() or outside.all():
        few = "1 row is" if len(data.texts) == 1 else f"{len(data.texts)} rows are"
        raise DataError(f"{few} too few to split off a validation fraction of {fraction}")
    # What was left out is told once, on the training side.
    training, validation = np.flatnonzero(~outside), np.flatnonzero(outside)
    return data.take(training), replace(data.take(validation), dropped=[])
