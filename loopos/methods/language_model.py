"""What methods that train on next tokens share: the objective, its evaluation, weights by span."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload

import numpy as np

from loopos.autograd import Tensor, no_grad
from loopos.data.batch import Batch
from loopos.data.store import TokenStore
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError
from loopos.methods.common import in_order, require_finite
from loopos.models.transformer import Transformer
from loopos.ops import DropoutKeys

Array = np.ndarray[Any, Any]

#: Some text, and how much each of its tokens counts in the loss.
Piece = tuple[str, float]


def require_language_model(model: Transformer, tokenizer: Tokenizer, method: str) -> None:
    """Refuse a model that predicts no next token, or that cannot hold the tokenizer's ids.

    Raises
    ------
    ConfigError
        If the model is bidirectional, has no head, or a smaller vocabulary than the tokenizer.
    """
    if not model.config.causal or not model.config.lm_head:
        raise ConfigError(f"{method} needs a causal model with a language-model head")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, "
            f"more than the model's vocab_size {model.config.vocab_size}"
        )


def require_reference(reference: Transformer, policy: Transformer) -> None:
    """Refuse a reference that would change with the policy, or does not know its tokens.

    Raises
    ------
    ConfigError
    """
    mine = [p.data for p in policy.parameters().values() if p.requires_grad]
    theirs = [p.data for p in reference.parameters().values()]
    if any(np.shares_memory(a, b) for a in mine for b in theirs):
        raise ConfigError("the reference shares weights with the policy, which changes")
    if not reference.config.causal or not reference.config.lm_head:
        raise ConfigError("the reference: expected a causal model with a language-model head")
    require_same_vocabulary(reference, policy, "the reference")


def require_same_vocabulary(network: Transformer, policy: Transformer, name: str) -> None:
    """Refuse a network that knows other tokens than the policy.

    Raises
    ------
    ConfigError
    """
    size, expected = network.config.vocab_size, policy.config.vocab_size
    if size != expected:
        raise ConfigError(f"{name} has a vocab_size of {size}, the policy has {expected}")


def endless(what: str, templated: bool) -> str:
    """Return the warning that nothing which is trained on marks the end of an answer."""
    why = (
        "the chat template closes no turn with a special token"
        if templated
        else "the tokenizer names no token that ends a text (eos_token in tokenizer_config.json)"
    )
    return f"nothing marks the end of {what}, so that the model does not learn to stop: {why}"


class SpanWeights(Sequence[Array]):
    """How much each token of each sample counts, by the kind of span that it stands in.

    Parameters
    ----------
    kinds : TokenStore
        A number for each token of each sample.
    table : ndarray float32 [K]
        The weight of each kind.
    """

    def __init__(self, kinds: TokenStore, table: Array):
        self._kinds, self._table = kinds, np.asarray(table, dtype=np.float32)

    def __len__(self) -> int:
        return len(self._kinds)

    @overload
    def __getitem__(self, key: int) -> Array: ...
    @overload
    def __getitem__(self, key: slice) -> list[Array]: ...
    def __getitem__(self, key: int | slice) -> Array | list[Array]:
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        weights: Array = self._table[self._kinds[int(key)]]
        return weights


class NextTokenObjective:
    """Next-token cross-entropy over the tokens that count."""

    def __init__(self, model: Transformer):
        self._model = model

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return how much the targets of the batch weigh: their number where each counts as 1."""
        return {"loss": float(batch.next_token_targets()[1].sum(dtype=np.float64))}

    def losses(self, batch: Batch, dropout: DropoutKeys | None) -> dict[str, Tensor]:
        """Return the summed loss of the batch."""
        return {"loss": self._model.next_token_loss(batch, dropout)[0]}


def next_token_evaluator(
    model: Transformer, tokens: TokenStore, loss_weights: Sequence[Array] | None = None
) -> Callable[[], dict[str, float]]:
    """Return a function that gives ``loss`` (nats a token) and ``perplexity`` on some samples."""

    def evaluate() -> dict[str, float]:
        total = count = 0.0
        with no_grad():
            for indices in in_order(tokens.lengths):
                weights = None if loss_weights is None else [loss_weights[i] for i in indices]
                batch = Batch.from_sequences([tokens[i] for i in indices], loss_weights=weights)
                loss, counted = model.next_token_loss(batch)
                total, count = total + loss.item(), count + counted
        mean = require_finite(total / count, "the loss on the evaluation data")
        return {"loss": mean, "perplexity": float(np.exp(mean))}

    return evaluate


class Previewing(Protocol):
    """What a trainer has that can show which tokens it trains on (``loopos preview``)."""

    def preview(self, training: Any, options: Any = None, rows: int = 3) -> list[list[Piece]]:
        """Return the first `rows` samples as they are trained on, each in pieces of one weight.

        Parameters
        ----------
        training : Texts
            Rows as the method reads them.
        options : TrainingOptions, optional
        rows : int
        """


def weighted_pieces(tokenizer: Tokenizer, ids: Array, weights: Array) -> list[Piece]:
    """Return the text of a sample in pieces, each as long as its tokens weigh the same.

    Special tokens are in the text. A character that is cut into several tokens belongs to the
    piece of its last one. The first token weighs nothing, as nothing predicts it.

    Parameters
    ----------
    tokenizer : Tokenizer
    ids : ndarray int32 [n]
    weights : ndarray float32 [n]
        How much each token counts as a target.
    """
    counted = np.array(weights, dtype=np.float32)
    counted[:1] = 0.0
    whole = tokenizer.decode(ids)
    ends = [*(np.flatnonzero(np.diff(counted)) + 1).tolist(), len(ids)]
    pieces: list[Piece] = []
    taken = 0
    for end in ends:
        begin, taken = taken, max(taken, _common(tokenizer.decode(ids[:end]), whole))
        if taken > begin:
            pieces.append((whole[begin:taken], float(counted[end - 1])))
    return pieces


def _common(text: str, whole: str) -> int:
    """Return how many characters two texts begin with in common."""
    if whole.startswith(text):
        return len(text)
    pairs = zip(text, whole, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(whole)))
