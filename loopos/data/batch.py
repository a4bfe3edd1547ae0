"""Ragged batches: sequences one after the other, no padding, no mask, no side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from loopos.errors import DataError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
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
    labels : ndarray [B] or None
    token_types : ndarray int32 [N] or None
    """

    tokens: Array
    offsets: Array
    sample_ids: Array
    loss_mask: Array
    labels: Array | None = None
    token_types: Array | None = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Any],
        labels: Any = None,
        loss_masks: Sequence[Any] | None = None,
        sample_ids: Any = None,
    ) -> Batch:
        """Make a batch of lists of token ids.

        Raises
        ------
        DataError
            If a sequence is empty, or labels or masks do not fit.
        """
        arrays = [np.asarray(s, dtype=np.int32) for s in sequences]
        for index, array in enumerate(arrays):
            if array.size == 0:
                raise DataError(f"sequence {index} is empty")
        lengths = np.array([a.size for a in arrays], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        if loss_masks is None:
            mask = np.ones(tokens.size, dtype=bool)
        else:
            mask = np.concatenate([np.asarray(m, bool) for m in loss_masks])
        ids = np.arange(len(arrays)) if sample_ids is None else np.asarray(sample_ids)
        return cls(
            tokens,
            offsets,
            ids.astype(np.int32),
            mask,
            None if labels is None else np.asarray(labels),
        )

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
        """Return (targets int32 [N], weights float32 [N])."""
        targets = np.zeros_like(self.tokens)
        weights = np.zeros(self.tokens.size, dtype=np.float32)
        targets[:-1] = self.tokens[1:]
        weights[:-1] = self.loss_mask[1:]
        weights[self.offsets[1:] - 1] = 0
        return targets, weights
