"""Prompts and what a policy answered, ragged; shared by the methods that learn from samples.

A response ends with its first stop token, which belongs to it, and nothing after it exists. Its
tokens are predicted by the states one position before them: those rows alone go through a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from loopos import ops
from loopos.autograd import Array, Tensor, no_grad
from loopos.data.batch import Batch
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, DataError, NumericalError
from loopos.generation import SamplingOptions, generate
from loopos.generation.generate import token_arrays
from loopos.models.config import TransformerConfig
from loopos.models.transformer import Transformer

__all__ = ["Forward", "Prompts", "Rollout", "collect", "forward_pass", "in_pieces",
           "response_logprobs", "response_states", "sample_rollout", "segment_sums",
           "take_segments"]  # fmt: skip

#: Tokens in one pass without gradients.
_PASS_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts as token ids, with what a reward is shown of them.

    Attributes
    ----------
    ids : list of ndarray int32
    shown : list
        Their texts; without a tokenizer their ids.
    answers : list or None
        What a verifiable reward compares with.
    """

    ids: list[Array]
    shown: list[Any]
    answers: list[Any] | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Any],
        tokenizer: Tokenizer | None,
        config: TransformerConfig,
        answers: Sequence[Any] | None = None,
    ) -> Prompts:
        """Take texts, which need a tokenizer, or token ids.

        Parameters
        ----------
        prompts : sequence of str or of int sequences
        tokenizer : Tokenizer or None
        config : TransformerConfig
            Of the policy: prompts are in its vocabulary, and leave room for a token.
        answers : sequence, optional
            One for each prompt.

        Raises
        ------
        DataError
            If a prompt is empty, too long, outside the vocabulary, or no prompt.
        """
        ids = token_arrays(prompts, tokenizer, config)
        if answers is not None and len(answers) != len(prompts):
            raise DataError(f"expected {len(prompts)} answers, one a prompt, found {len(answers)}")
        shown = list(prompts)
        for index, array in enumerate(ids):
            if not isinstance(prompts[index], str):
                numbers = array.tolist()
                shown[index] = numbers if tokenizer is None else tokenizer.decode(numbers)
        return cls(ids, shown, None if answers is None else list(answers))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Array:
        """Tokens of each prompt."""
        return np.array([ids.size for ids in self.ids], dtype=np.int64)

    def take(self, indices: Array, repeats: int = 1) -> Prompts:
        """Return some of them, each several times in a row."""
        chosen = [int(i) for i in indices for _ in range(repeats)]
        answers = self.answers
        return Prompts(
            [self.ids[i] for i in chosen],
            [self.shown[i] for i in chosen],
            None if answers is None else [answers[i] for i in chosen],
        )


@dataclass(frozen=True, eq=False)
class Rollout:
    """``B`` prompts, each with its response: ``N`` tokens, of which ``M`` are of responses.

    Attributes
    ----------
    tokens : ndarray int32 [N]
        Prompt and response, one sequence after the other.
    offsets : ndarray int64 [B + 1]
        Where each sequence begins.
    prompt_lengths : ndarray int64 [B]
    response_offsets : ndarray int64 [B + 1]
        Where each response begins in arrays of ``M``.
    logprobs : ndarray [M]
        Of the response tokens, when they were sampled; NaN where that is not known.
    ended : ndarray bool [B]
        Whether a stop token came.
    prompts, texts : list
        Prompts and responses as a reward sees them: texts, or ids without a tokenizer.
    samples : ndarray int64 [B]
        Number of each prompt in the data, for messages.
    answers : list or None
    """

    tokens: Array
    offsets: Array
    prompt_lengths: Array
    response_offsets: Array
    logprobs: Array
    ended: Array
    prompts: list[Any]
    texts: list[Any]
    samples: Array
    answers: list[Any] | None = None

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        responses: Sequence[Any],
        *,
        logprobs: Sequence[Any] | None = None,
        ended: Sequence[bool] | None = None,
        texts: Sequence[Any] | None = None,
        samples: Any = None,
    ) -> Rollout:
        """Join prompts and responses, such as recorded ones.

        Parameters
        ----------
        prompts : Prompts
        responses : sequence of int sequences
            New tokens of each.
        logprobs : sequence of arrays, optional
            Of these, when they were sampled.
        ended : sequence of bool, optional
            Whether each ends with a stop token; by default all do.
        texts : sequence, optional
            What the reward is shown; by default the ids.
        samples : array_like of int, optional
        """
        count = len(prompts)
        for name, given in (("responses", responses), ("logprobs", logprobs), ("ended", ended),
                            ("texts", texts)):  # fmt: skip
            if given is not None and len(given) != count:
                raise DataError(f"expected {count} {name}, one a prompt, found {len(given)}")
        arrays = [np.asarray(r, dtype=np.int32).reshape(-1) for r in responses]
        sizes = np.array([a.size for a in arrays], dtype=np.int64)
        pieces = [piece for pair in zip(prompts.ids, arrays, strict=True) for piece in pair]
        known = [np.full(n, np.nan) for n in sizes] if logprobs is None else list(logprobs)
        return cls(
            np.concatenate(pieces) if pieces else np.zeros(0, np.int32),
            _offsets(prompts.lengths + sizes),
            prompts.lengths,
            _offsets(sizes),
            np.concatenate(known) if known else np.zeros(0),
            np.ones(count, bool) if ended is None else np.asarray(ended, dtype=bool),
            prompts.shown,
            [a.tolist() for a in arrays] if texts is None else list(texts),
            np.arange(count) if samples is None else np.asarray(samples),
            prompts.answers,
        )

    def __len__(self) -> int:
        return int(self.prompt_lengths.size)

    @cached_property
    def lengths(self) -> Array:
        """Tokens of each response, int64 [B]."""
        return np.diff(self.response_offsets)

    @cached_property
    def _places(self) -> Array:
        """Where each response token stands in `tokens`, int64 [M]."""
        starts = self.offsets[:-1] + self.prompt_lengths - self.response_offsets[:-1]
        return np.arange(self.response_offsets[-1]) + np.repeat(starts, self.lengths)

    @cached_property
    def targets(self) -> Array:
        """The response tokens, int32 [M]."""
        return self.tokens[self._places]

    @cached_property
    def inputs(self) -> Batch:
        """What predicts them: all tokens but each sequence's last one, which predicts nothing."""
        keep = np.ones(self.tokens.size, bool)
        keep[self.offsets[1:] - 1] = False
        count = len(self)
        offsets = (self.offsets - np.arange(count + 1)).astype(np.int32)
        tokens = self.tokens[keep]
        mask = np.zeros(tokens.size, bool)
        return Batch(tokens, offsets, np.arange(count, dtype=np.int32), mask)

    @cached_property
    def rows(self) -> Array:
        """Row of `inputs` whose state predicts each response token, int32 [M]."""
        sequence = np.repeat(np.arange(len(self)), self.lengths)
        return (self._places - 1 - sequence).astype(np.int32)

    def take(self, indices: Array) -> Rollout:
        """Return some of the sequences."""
        spans = [slice(*self.offsets[i : i + 2]) for i in indices]
        return Rollout(
            np.concatenate([self.tokens[:0], *(self.tokens[span] for span in spans)]),
            _offsets(np.diff(self.offsets)[indices]),
            self.prompt_lengths[indices],
            _offsets(self.lengths[indices]),
            take_segments(self.logprobs, self.response_offsets, indices),
            self.ended[indices],
            [self.prompts[i] for i in indices],
            [self.texts[i] for i in indices],
            self.samples[indices],
            None if self.answers is None else [self.answers[i] for i in indices],
        )

    def with_end_states(self, more: Array) -> Rollout:
        """Return one in which some responses have another token, so that a state follows their end.

        Parameters
        ----------
        more : ndarray bool [B]
            Which; that token is of no meaning.
        """
        ends, places = self.offsets[1:][more], self.response_offsets[1:][more]
        counts = more.astype(np.int64)
        return replace(
            self,
            tokens=np.insert(self.tokens, ends, self.tokens[ends - 1]),
            offsets=_offsets(np.diff(self.offsets) + counts),
            response_offsets=_offsets(self.lengths + counts),
            logprobs=np.insert(self.logprobs, places, np.nan),
        )

    def sample_of(self, token: int) -> int:
        """Return the number of the prompt that a response token belongs to."""
        place = int(np.searchsorted(self.response_offsets, token, side="right")) - 1
        return int(self.samples[place])

    def require_tokens(self) -> None:
        """Check that there is something to learn from in every response.

        Raises
        ------
        NumericalError
            Naming the sample without a token; or if there is none at all.
        """
        if not self.lengths.any():
            raise NumericalError("no response has a token, so nothing counts")
        empty = np.flatnonzero(self.lengths == 0)
        if empty.size:
            raise NumericalError(
                f"the response to sample {int(self.samples[empty[0]])} has no token"
            )


def _offsets(lengths: Array) -> Array:
    return np.append(0, np.cumsum(lengths)).astype(np.int64)


def take_segments(x: Array, offsets: Array, indices: Array) -> Array:
    """Return the values of some segments of a ragged array, one after the other."""
    return np.concatenate([x[:0], *(x[offsets[i] : offsets[i + 1]] for i in indices)])


def segment_sums(x: Array, offsets: Array) -> Array:
    """Return the sum of each segment, float64 [B]; none may be empty."""
    sums: Array = np.add.reduceat(x.astype(np.float64), offsets[:-1])
    return sums


def sample_rollout(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompts: Prompts,
    options: SamplingOptions,
    *,
    samples: Array,
    weights: str = "float32",
    batch_size: int = 64,
) -> Rollout:
    """Let a policy answer every prompt, ``options.num_samples`` times in a row.

    Tokens are drawn from its whole distribution.

    Parameters
    ----------
    model : Transformer
    tokenizer : Tokenizer or None
    prompts : Prompts
    options : SamplingOptions
        Whose log-probabilities are those of the logits over `temperature`.
    samples : ndarray of int [B]
        Numbers of the prompts in the data.
    weights : str
        What to compute with, see :func:`loopos.generation.generate`.
    batch_size : int
        Rows at once.

    Raises
    ------
    ConfigError
        If the options would cut the distribution, or take no random number.
    """
    if options.top_k or options.top_p < 1 or options.min_p or options.repetition_penalty != 1:
        raise ConfigError("rollouts are sampled from the whole distribution: no top_k, top_p, ...")
    if options.temperature <= 0:
        raise ConfigError("temperature: rollouts need one above 0")
    found = generate(model, prompts.ids, options, tokenizer=tokenizer, weights=weights,
                     batch_size=batch_size)  # fmt: skip
    repeats = options.num_samples
    return Rollout.of(
        prompts.take(np.arange(len(prompts)), repeats),
        [g.ids for g in found],
        logprobs=[g.logprobs for g in found],
        ended=[g.stop_reason == "stop_token" for g in found],
        texts=None if tokenizer is None else [g.text for g in found],
        samples=np.repeat(samples, repeats),
    )


def in_pieces(rollout: Rollout) -> Iterator[Rollout]:
    """Yield the sequences in pieces of a size for one pass, in order."""
    sizes = np.diff(rollout.offsets)
    start = 0
    while start < len(rollout):
        end, held = start + 1, int(sizes[start])
        while end < len(rollout) and held + sizes[end] <= _PASS_TOKENS:
            held += int(sizes[end])
            end += 1
        whole = start == 0 and end == len(rollout)
        yield rollout if whole else rollout.take(np.arange(start, end))
        start = end


def response_states(model: Transformer, rollout: Rollout) -> Tensor:
    """Return the states that predict the response tokens, ``[M, C]``; without dropout."""
    return model.get_hidden_states(rollout.inputs, rows=rollout.rows)


def response_logprobs(
    model: Transformer, states: Tensor, rollout: Rollout, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log-probability of each response token and entropy of its distribution: ``[M]``."""
    return ops.linear_logprobs(states, model.head_weight, rollout.targets, temperature)


@dataclass
class Forward:
    """A pass of the policy (and the critic) over a rollout, on the tape.

    Attributes
    ----------
    states : Tensor [M, C] or None
        Of the policy.
    logprobs, entropy : Tensor [M]
    values : Tensor or None
        Of the critic.
    """

    states: Tensor | None
    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None


def forward_pass(model: Transformer, rollout: Rollout, temperature: float) -> Forward:
    """Return the policy's part of a pass."""
    states = response_states(model, rollout)
    return Forward(states, *response_logprobs(model, states, rollout, temperature))


def collect(
    model: Transformer,
    rollout: Rollout,
    temperature: float,
    reference: Transformer | None = None,
    exact: bool = False,
    values: Callable[[Rollout, Tensor], Tensor] | None = None,
    recorded: list[Forward] | None = None,
) -> dict[str, Array]:
    """Compute in training precision what is frozen for a step.

    Parameters
    ----------
    model : Transformer
        The policy.
    rollout : Rollout
    temperature : float
        Of policy and reference alike.
    reference : Transformer, optional
    exact : bool
        Also the exact KL to the reference.
    values : callable, optional
        Of a critic: a value for each response token, from the rollout and the policy's states.
    recorded : list of Forward, optional
        Gets the pass itself, on the tape, where one pass holds all; else nothing is recorded.

    Returns
    -------
    dict of str to ndarray [M]
        "logprobs", "entropy"; with a reference "ref_logprobs"; if asked for "exact_kl" and
        "values".
    """
    found: dict[str, list[Array]] = {}
    pieces = list(in_pieces(rollout))
    keep = recorded is not None and len(pieces) == 1
    for piece in pieces:
        # The reference goes first: what its pass needs is free again when the tape is full.
        ref: dict[str, Array] = {}
        ref_states: Array | None = None
        if reference is not None:
            with no_grad():
                at_reference = forward_pass(reference, piece, temperature)
            ref["ref_logprobs"] = at_reference.logprobs.data
            assert at_reference.states is not None
            ref_states = at_reference.states.data if exact else None
        with nullcontext() if keep else no_grad():
            done = forward_pass(model, piece, temperature)
            assert done.states is not None
            if values is not None:
                done.values = values(piece, done.states)
        if keep and recorded is not None:
            recorded.append(done)
        # Copies: what is frozen is not to change with what is on the tape.
        made = {"logprobs": done.logprobs.data.copy(), "entropy": done.entropy.data.copy()}
        if done.values is not None:
            made["values"] = done.values.data.copy()
        made |= ref
        if reference is not None and ref_states is not None:
            with no_grad():
                made["exact_kl"] = ops.linear_kl(
                    done.states, model.head_weight, ref_states, reference.head_weight.data,
                    temperature,
                ).data  # fmt: skip
        for name, array in made.items():
            found.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in found.items()}
