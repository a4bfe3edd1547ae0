"""Ragged batches: sequences one after the other, no padding, no mask, no side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from loopos.errors import DataError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)  # arrays have no single truth to compare by
class Batch:
    """A ragged batch of ``B`` sequences with ``N`` tokens in all.

    Attributes
    ----------
    tokens : ndarray int32 [N]
    offsets : ndarray int32 [B + 1]
        Where each sequence begins in `tokens`.
    sample_ids : ndarray int32 [B]
        Index of each sequence in the whole effective batch (keys dropout).
    loss_mask : ndarray bool [N]
        True: this token counts as a target.
    loss_weights : ndarray float32 [N] or None
        How much each token counts as a target, 0 where the mask is False; None counts each as 1.
    labels : ndarray [B] or None
    token_types : ndarray int32 [N] or None
    decoding : bool
        True: a step of generation, each sequence the one token that follows those of a cache.
    """

    tokens: Array
    offsets: Array
    sample_ids: Array
    loss_mask: Array
    labels: Array | None = None
    token_types: Array | None = None
    loss_weights: Array | None = None
    decoding: bool = False

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Any],
        labels: Any = None,
        loss_masks: Sequence[Any] | None = None,
        sample_ids: Any = None,
        loss_weights: Sequence[Any] | None = None,
    ) -> Batch:
        """Make a batch of lists of token ids.

        Parameters
        ----------
        sequences : sequence of int sequences
            At least one token each; no sequence at all gives an empty batch.
        labels : array_like [B], optional
        loss_masks : sequence of bool sequences, optional
            True or 1 where a token counts, one value a token; by default every token counts.
        sample_ids : array_like of int [B], optional
            By default the place in this batch.
        loss_weights : sequence of float sequences, optional
            How much each token counts, from 0, in place of masks.

        Raises
        ------
        DataError
            If a sequence is empty or no list of token ids, or labels, masks or sample ids do not
            fit.
        """
        arrays = [_token_ids(index, sequence) for index, sequence in enumerate(sequences)]
        lengths = np.array([a.size for a in arrays], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        weights = None if loss_weights is None else _joined_weights(loss_weights, lengths)
        if weights is not None:
            if loss_masks is not None:
                raise DataError("expected loss_masks or loss_weights, found both")
            mask = weights > 0
        elif loss_masks is None:
            mask = np.ones(tokens.size, dtype=bool)
        else:
            mask = _joined_masks(loss_masks, lengths)
        ids = np.arange(len(arrays)) if sample_ids is None else np.asarray(sample_ids)
        marks = None if labels is None else np.asarray(labels)
        for name, values in (("sample_ids", ids), ("labels", marks)):
            if values is not None and values.shape[:1] != (len(arrays),):
                found = len(values) if values.ndim else "a single value"
                raise DataError(f"expected {name} for {len(arrays)} sequences, found {found}")
        if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
            raise DataError(f"expected integers as sample_ids, found {ids.dtype}{list(ids.shape)}")
        return cls(tokens, offsets, ids.astype(np.int32), mask, marks, loss_weights=weights)

    @cached_property
    def lengths(self) -> Array:
        """Length of each sequence, int32 [B]."""
        return np.diff(self.offsets)

    @cached_property
    def positions(self) -> Array:
        """Position of each token in its sequence, int32 [N]."""
        starts = np.repeat(self.offsets[:-1], self.lengths)
        return (np.arange(self.tokens.size) - starts).astype(np.int32)

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.tokens.size)

    @property
    def num_sequences(self) -> int:
        """B."""
        return int(self.offsets.size - 1)

    def next_token_targets(self) -> tuple[Array, Array]:
        """Return what each token is to predict, and whether that counts.

        Returns
        -------
        targets : ndarray int32 [N]
            The next token of the same sequence; meaningless where the weight is 0.
        weights : ndarray float32 [N]
            The loss mask, or loss weight, of the next token; 0 at the last token of each sequence.
        """
        targets = np.zeros_like(self.tokens)
        weights = np.zeros(self.tokens.size, dtype=np.float32)
        targets[:-1] = self.tokens[1:]
        counts = self.loss_mask if self.loss_weights is None else self.loss_weights
        weights[:-1] = counts[1:]
        weights[self.offsets[1:] - 1] = 0
        return targets, weights


def _token_ids(index: int, sequence: Any) -> Array:
    """Return a sequence as int32 [n]; a cast alone would cut fractions and wrap large numbers."""
    try:
        array = np.asarray(sequence)
    except ValueError as error:  # lists of different lengths inside
        raise DataError(f"sequence {index}: expected a list of token ids") from error
    if array.ndim == 1 and array.size == 0:
        raise DataError(f"sequence {index} is empty")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"sequence {index}: expected a list of token ids, "
            f"found {array.ndim} dimensions of {array.dtype}"
        )
    bounds = np.iinfo(np.int32)
    if array.min() < bounds.min or array.max() > bounds.max:
        raise DataError(f"sequence {index}: a token id does not fit 32 bits")
    return array.astype(np.int32, copy=False)


def _joined_weights(weights: Sequence[Any], lengths: Array) -> Array:
    """Return the weights of all sequences, float32 [N]."""
    if len(weights) != lengths.size:
        raise DataError(f"expected loss_weights for {lengths.size} sequences, found {len(weights)}")
    arrays = [np.asarray(values, dtype=np.float32) for values in weights]
    for index, (values, length) in enumerate(zip(arrays, lengths, strict=True)):
        if values.shape != (length,):
            raise DataError(
                f"sequence {index}: expected {length} loss weights, found {values.size}"
            )
        if not (np.isfinite(values) & (values >= 0)).all():
            raise DataError(f"sequence {index}: expected finite loss weights of at least 0")
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.float32)


def _joined_masks(masks: Sequence[Any], lengths: Array) -> Array:
    """Return the masks of all sequences, bool [N]."""
    if len(masks) != lengths.size:
        raise DataError(f"expected loss_masks for {lengths.size} sequences, found {len(masks)}")
    arrays = [np.asarray(mask) for mask in masks]
    for index, (mask, length) in enumerate(zip(arrays, lengths, strict=True)):
        if mask.shape != (length,):
            raise DataError(
                f"sequence {index}: expected a loss mask of {length} values, found {mask.size}"
            )
        if not np.isin(mask, (0, 1)).all():  # a weight would become True in silence
            raise DataError(f"sequence {index}: expected a loss mask of true and false or 1 and 0")
    return np.concatenate(arrays).astype(bool) if arrays else np.zeros(0, dtype=bool)
