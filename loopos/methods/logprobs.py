"""Log-probabilities of whole responses, by a policy and by what it is held to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loopos import ops
from loopos.autograd import Array, Tensor, no_grad
from loopos.data.batch import Batch
from loopos.data.responses import Responses
from loopos.methods.common import in_order
from loopos.models.transformer import Transformer
from loopos.ops import DropoutKeys

__all__ = ["Reference", "ResponseLogprobs", "response_logprobs", "response_sums"]


@dataclass(frozen=True)
class ResponseLogprobs:
    """Log-probabilities of the tokens of responses.

    Attributes
    ----------
    tokens : Tensor [M]
        Of each token of every response.
    owner : ndarray int64 [M]
        Whose token it is.
    sums : ndarray float64 [B]
        Of each response.
    lengths : ndarray float64 [B]
    """

    tokens: Tensor
    owner: Array
    sums: Array
    lengths: Array

    def gradient(self, of_sums: Array) -> Array:
        """Return the gradient along `tokens` of what has the gradient `of_sums` along `sums`."""
        return of_sums[self.owner].astype(self.tokens.dtype)


def response_logprobs(
    model: Transformer, batch: Batch, dropout: DropoutKeys | None = None
) -> ResponseLogprobs:
    """Return the log-probabilities of the tokens under a batch's loss mask."""
    targets, weights = batch.next_token_targets()
    rows = np.flatnonzero(weights)  # the head sees only what predicts a response's token
    hidden = model.get_hidden_states(batch, dropout, rows=rows)
    tokens, _ = ops.linear_logprobs(hidden, model.head_weight, targets[rows])
    owner = np.repeat(np.arange(batch.num_sequences), batch.lengths)[rows]
    # Added token by token, in their order: a response's sum does not depend on its batch.
    sums = np.bincount(owner, tokens.data, minlength=batch.num_sequences)
    lengths = np.bincount(owner, minlength=batch.num_sequences).astype(np.float64)
    return ResponseLogprobs(tokens, owner, sums, lengths)


def response_sums(model: Transformer, encoded: Responses, batch_tokens: int = 4096) -> Array:
    """Return the log-probability of every response, float64."""
    sums = np.zeros(len(encoded.tokens))
    with no_grad():
        for which in in_order(encoded.tokens.lengths, batch_tokens):
            sums[which] = response_logprobs(model, encoded.batch_of(which)).sums
    return sums


class Reference:
    """What the reference says of responses: zeros without one.

    Parameters
    ----------
    model : Transformer or None
        Never changed; nothing is recorded of it.
    encoded : Responses
    known : ndarray float64, optional
        What it says of all of them, where that was computed already.
    """

    def __init__(self, model: Transformer | None, encoded: Responses, known: Array | None = None):
        self._model, self._encoded, self._known = model, encoded, known

    def of_all(self) -> Array:
        """Return the log-probability of every response, float64."""
        if self._known is not None:
            return self._known
        if self._model is None:
            return np.zeros(len(self._encoded.tokens))
        return response_sums(self._model, self._encoded)

    def sums(self, batch: Batch) -> Array:
        """Return the log-probability of each response of a batch."""
        if self._known is not None:
            known: Array = self._known[batch.labels]
            return known
        if self._model is None:
            return np.zeros(batch.num_sequences)
        with no_grad():
            return response_logprobs(self._model, batch).sums
