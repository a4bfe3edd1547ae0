"""Generate text: many prompts at once, or one that is shown as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from loopos.autograd import Array
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, DataError, LooposError
from loopos.generation.engine import Engine, Generation, common_prefix
from loopos.generation.kv_cache import KVCache
from loopos.generation.sampling import SamplingOptions, with_overrides
from loopos.models.config import TransformerConfig
from loopos.models.quantized import with_weights
from loopos.models.transformer import Transformer

__all__ = ["Session", "generate", "stream"]

#: New tokens that a cache has room for from the beginning; it grows for those who want more.
_ROOM_AHEAD = 512


def generate(
    model: Transformer,
    prompts: Sequence[Any],
    options: SamplingOptions | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 16,
    weights: str = "float32",
    on_finish: Callable[[Generation], None] | None = None,
    share_prefix: bool = True,
    **overrides: Any,
) -> list[Generation]:
    """Generate samples for each prompt.

    Rows that stop leave the batch and waiting prompts take their place. The samples of a prompt,
    and prompts that begin with the same tokens, compute what they have in common once.
    What a row becomes depends on the model, the options, its prompt and its indices alone, not on
    the other prompts, `batch_size` or the number of threads: to the byte on the Cython backend.

    The cache takes ``2 num_layers batch_size tokens kv_heads head_dim`` numbers of the model's
    dtype, `tokens` being those of the longest prompt and `max_new_tokens` (at most
    `max_seq_len`); see :meth:`KVCache.bytes_for`. Memory that no token comes to is not used.

    Parameters
    ----------
    model : Transformer
        Causal, with a language-model head.
    prompts : sequence of str or of int sequences
        Texts, which need a tokenizer, or token ids.
    options : SamplingOptions, optional
    tokenizer : Tokenizer, optional
        Also names the tokens that end a text, ``end_ids``.
    batch_size : int
        Rows at once.
    weights : {"float32", "bfloat16", "int8"}
        What to compute with; "float32" takes the model as it is. See :func:`with_weights`.
    on_finish : callable, optional
        Called with each generation as it finishes.
    share_prefix : bool
        False computes every prompt whole.
    **overrides
        Sampling options by name, over those of `options`.

    Returns
    -------
    list of Generation
        By prompt, and by sample within a prompt.

    Raises
    ------
    ConfigError
        If an option does not fit, or the model cannot generate.
    DataError
        If a prompt is empty, too long or no list of the model's tokens; the message names it.
    NumericalError
        If the model's logits are not finite.
    """
    options = with_overrides(options, overrides)
    _check(model, options, tokenizer)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size: expected a whole number from 1, found {batch_size!r}")
    arrays = token_arrays(prompts, tokenizer, model.config)
    model = with_weights(model, weights)
    if not arrays:
        return []
    slots = min(batch_size, len(arrays) * options.num_samples)
    longest = max(array.size for array in arrays)
    cache = _cache(model, slots, longest + options.max_new_tokens, longest)
    engine = Engine(model, tokenizer, cache, options, share_prefix=share_prefix)
    results: list[Generation] = []
    for generation in engine.run(arrays):
        results.append(generation)
        if on_finish is not None:
            on_finish(generation)
    return sorted(results, key=lambda g: (g.prompt_index, g.sample_index))


def stream(
    model: Transformer,
    prompt: Any,
    options: SamplingOptions | None = None,
    *,
    tokenizer: Tokenizer,
    weights: str = "float32",
    **overrides: Any,
) -> Iterator[str]:
    """Return an iterator of the pieces of one text, each as soon as it is certain.

    Together they are the text that :func:`generate` gives for this prompt. Parameters and errors
    are those of :func:`generate`; a conversation is a :class:`Session`.
    """
    return Session(model, tokenizer, weights).stream(prompt, options, **overrides)


class Session:
    """A text that goes on: what a new prompt has in common with the last one is not computed again.

    The keys and values of generated tokens are kept too, so that a chat computes each message once.
    As these were computed token by token, the last bits can differ from those of a fresh start.

    Parameters
    ----------
    model : Transformer
    tokenizer : Tokenizer
    weights : {"float32", "bfloat16", "int8"}

    Attributes
    ----------
    last : Generation or None
        What the last stream has generated, once it is at its end.
    held : ndarray int32
        Tokens whose keys and values are kept.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, weights: str = "float32"):
        _check(model, SamplingOptions(), tokenizer)
        if tokenizer is None:
            raise ConfigError("tokenizer: expected one, since pieces of text are asked for")
        self.model, self.tokenizer = with_weights(model, weights), tokenizer
        self.last: Generation | None = None
        self.held: Array = np.zeros(0, np.int32)
        self._cache: KVCache | None = None
        self._turn = 0

    def stream(
        self, prompt: Any, options: SamplingOptions | None = None, **overrides: Any
    ) -> Iterator[str]:
        """Return an iterator of pieces of text; see :func:`stream`.

        Parameters
        ----------
        prompt : str or int sequence
            The whole text so far.
        options : SamplingOptions, optional
        **overrides
            Sampling options by name.

        Raises
        ------
        ConfigError, DataError
            As :func:`generate`.
        LooposError
            When an iterator is asked for more after another one of this session was begun.
        """
        options = with_overrides(options, overrides)
        if options.num_samples != 1:
            raise ConfigError(f"num_samples: a stream has 1, found {options.num_samples}")
        (ids,) = token_arrays([prompt], self.tokenizer, self.model.config)
        self._turn += 1
        return self._pieces(ids, options, self._turn)

    def _pieces(self, ids: Array, options: SamplingOptions, turn: int) -> Iterator[str]:
        self._require_turn(turn)
        if self._cache is None:
            self._cache = _cache(self.model, 1, ids.size + options.max_new_tokens, ids.size)
            self._cache.allocate()
        cache = self._cache
        # The last token is always computed, since its logits are wanted.
        cache.lengths[0] = min(common_prefix(self.held, ids), ids.size - 1)
        self.held = ids[: cache.lengths[0]]
        self.last = None
        engine = Engine(self.model, self.tokenizer, cache, options, streaming=True)
        row = None
        try:
            logits = engine.prefill([ids], [0])
            row = engine.start(0, 0, ids, 0)
            engine.choose([row], logits)
            engine.arrange()
            while True:
                assert row.tail is not None
                piece = row.tail.release(last=row.stop_reason is not None)
                if piece:
                    yield piece
                self._require_turn(turn)
                if row.stop_reason is not None:
                    break
                engine.step()
            self.last = engine.result(row)
        finally:
            if turn == self._turn:  # else the cache is another stream's
                tokens = ids if row is None else np.append(ids, np.array(row.ids, np.int32))
                self.held = tokens[: cache.lengths[0]]

    def _require_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise LooposError("another stream of this session was begun; this one is at its end")


def _cache(model: Transformer, slots: int, tokens: int, at_first: int) -> KVCache:
    """Return a cache for rows of so many tokens, with room for the first ones."""
    capacity = min(tokens, at_first + _ROOM_AHEAD, model.config.max_seq_len)
    return KVCache(model.config, slots, capacity, model.dtype)


def _check(model: Transformer, options: SamplingOptions, tokenizer: Tokenizer | None) -> None:
    """Raise ConfigError where model, options and tokenizer do not go together."""
    if not isinstance(model, Transformer):
        raise ConfigError(f"model: expected a Transformer, found {type(model).__name__}")
    if not model.config.causal:
        raise ConfigError("a bidirectional model (causal is false) cannot generate")
    _ = model.head_weight  # says what is missing
    if options.stop and tokenizer is None:
        raise ConfigError("stop: stop strings need a tokenizer; without one give stop_ids")


def token_arrays(
    prompts: Sequence[Any], tokenizer: Tokenizer | None, config: TransformerConfig
) -> list[Array]:
    """Return each prompt, a text or token ids, as int32 [n].

    Raises
    ------
    DataError
        If one is empty, outside the vocabulary, leaves no room for a token, or is no prompt.
    """
    if isinstance(prompts, str):
        raise DataError("expected a list of prompts, found one text")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter([] if tokenizer is None else tokenizer.encode_open(texts))
    arrays = []
    for index, prompt in enumerate(prompts):
        text = isinstance(prompt, str)
        if text and tokenizer is None:
            raise DataError(f"prompt {index} is a text, which needs a tokenizer")
        arrays.append(_token_array(index, next(encoded) if text else prompt, config))
    return arrays


def _token_array(index: int, prompt: Any, config: TransformerConfig) -> Array:
    try:
        array = np.asarray(prompt)
    except ValueError as error:  # lists of different lengths inside
        raise DataError(f"prompt {index}: expected a text or a list of token ids") from error
    if array.ndim == 1 and array.size == 0:
        raise DataError(f"prompt {index} is empty")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"prompt {index}: expected a text or a list of token ids, found {type(prompt).__name__}"
        )
    if array.size >= config.max_seq_len:
        raise DataError(
            f"prompt {index} has {array.size} tokens, which leaves no room for a new one "
            f"(max_seq_len {config.max_seq_len})"
        )
    outside = array[(array < 0) | (array >= config.vocab_size)]
    if outside.size:
        raise DataError(
            f"prompt {index}: token id {outside[0]} is outside the vocabulary "
            f"of {config.vocab_size}"
        )
    return array.astype(np.int32)
