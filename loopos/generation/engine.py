"""The machine behind `generate` and `stream`: slots that rows come into and leave.

Every number of a row follows from the row alone: it makes no difference who else is in the batch,
what a prompt shares with others and where a long one is cut, provided that a backend computes a row
of a product, and a query's attention, the same whatever is computed beside it. The Cython backend
does; others round differently.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loopos.autograd import Array, Tensor, no_grad
from loopos.backends import get_backend
from loopos.data.batch import Batch
from loopos.data.tokenizer import Tokenizer
from loopos.errors import NumericalError
from loopos.generation.kv_cache import KVCache
from loopos.generation.sampling import RowNumbers, SamplingOptions, SeenTokens
from loopos.generation.steps import RepeatedSteps
from loopos.generation.text import TextTail
from loopos.models.transformer import Transformer

__all__ = ["Engine", "Generation", "Row", "common_prefix"]

#: Tokens of prompts in one pass: bounds the memory of activations.
PASS_TOKENS = 2048


@dataclass(frozen=True, eq=False)  # arrays have no single truth to compare by
class Generation:
    """What was generated for one sample of one prompt.

    Attributes
    ----------
    prompt_index, sample_index : int
    ids : ndarray int32 [n]
        The new tokens, with the one that ended the row if a token did.
    logprobs : ndarray [n]
        Log-probability of each new token, in nats: of the logits after the repetition penalty,
        divided by the temperature (by 1 at temperature 0), before top-k, top-p and min-p.
    text : str or None
        Text of the new tokens, without special tokens, the token that ended the row and a stop
        string; None without a tokenizer.
    stop_reason : {"stop_token", "stop_string", "length", "context"}
        A stop token or the end of text, a stop string, `max_new_tokens`, or the model's
        `max_seq_len`.
    """

    prompt_index: int
    sample_index: int
    ids: Array
    logprobs: Array
    text: str | None
    stop_reason: str


@dataclass(eq=False, slots=True)
class Row:
    """A sample that is being generated."""

    prompt_index: int
    sample_index: int
    slot: int
    limit: int
    limit_reason: str
    tail: TextTail | None
    ids: list[int]
    logprobs: list[float]
    stop_reason: str | None = None


@dataclass(slots=True)
class _Samples:
    """A prompt of which not all samples were started, and the logits behind it."""

    index: int
    prompt: Array
    next_sample: int
    logits: Array


def common_prefix(a: Array, b: Array) -> int:
    """Return how many tokens two lists begin with in common."""
    n = min(a.size, b.size)
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


class Engine:
    """Generates rows on the slots of one cache.

    Parameters
    ----------
    model : Transformer
    tokenizer : Tokenizer or None
    cache : KVCache
    options : SamplingOptions
    share_prefix : bool
        Copy the keys and values of what prompts have in common; False computes them each time.
    streaming : bool
        Keep the text of every row as it grows.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        cache: KVCache,
        options: SamplingOptions,
        *,
        share_prefix: bool = True,
        streaming: bool = False,
    ):
        self.model, self.tokenizer, self.cache, self.options = model, tokenizer, cache, options
        self._share, self._streaming = share_prefix, streaming
        self._stops = set(options.stop_ids)
        if tokenizer is not None and not options.ignore_eos:
            self._stops.update(tokenizer.end_ids)
        if tokenizer is not None:  # special tokens are not in the text that is searched
            named = map(tokenizer.token_to_id, options.stop)
            added = tokenizer.added_ids
            self._stops.update(id_ for id_ in named if id_ is not None and id_ in added)
        slots = cache.slots
        self._numbers = RowNumbers(slots) if options.temperature > 0 else None
        penalty = options.repetition_penalty
        self._seen = SeenTokens(slots, penalty) if penalty != 1.0 else None
        self._queue: deque[tuple[int, Array]] = deque()
        self._samples: _Samples | None = None
        # The prompt whose keys and values stand in each slot, also after its row has left.
        self._prompts: list[Array] = [np.zeros(0, np.int32)] * slots
        self._rows: list[Row] = []
        # Of steps: these arrays stay where they are, so that a backend can repeat a step.
        self._slots, self._tokens = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
        self._offsets = np.arange(slots + 1, dtype=np.int32)
        self._mask = np.zeros(slots, bool)
        self._batch = self._batch_of(0)
        self._steps = RepeatedSteps(model, cache)

    def run(self, prompts: Sequence[Array]) -> Iterator[Generation]:
        """Yield what was generated, row by row, as rows finish."""
        self._queue.extend(enumerate(prompts))
        while self._queue or self._samples or self._rows:
            if self.cache.free and (self._queue or self._samples):
                yield from self._leave(self._admit())
            if self._rows:
                yield from self._leave(self.step())

    # -- rows come and go ------------------------------------------------------------------------

    def _admit(self) -> list[Row]:
        """Give the free slots to waiting samples and prompts, and choose their first tokens."""
        started: list[Row] = []
        logits: list[Array] = []
        self._start_samples(started, logits)
        wave: list[tuple[int, Array]] = []
        room = len(self.cache.free)
        while self._queue and room > 0:
            wave.append(self._queue.popleft())
            room -= self.options.num_samples
        if wave:
            slots = [self.cache.allocate() for _ in wave]
            found = self._prefill_sharing([prompt for _, prompt in wave], slots)
            for (index, prompt), slot, row in zip(wave, slots, found, strict=True):
                started.append(self.start(index, 0, prompt, slot))
                logits.append(row)
                if self.options.num_samples > 1:
                    self._samples = _Samples(index, prompt, 1, row)
                    self._start_samples(started, logits)
        self.choose(started, np.stack(logits))
        return started

    def _start_samples(self, started: list[Row], logits: list[Array]) -> None:
        """Start samples of the prompt at hand while there are slots.

        As they go first, one slot at least has the keys and values of their prompt: that of a row
        that runs, or one that was just left and is taken again.
        """
        while self._samples is not None and self.cache.free:
            samples = self._samples
            holders = [s for s, p in enumerate(self._prompts) if p is samples.prompt]
            free = [slot for slot in holders if slot in self.cache.free]
            slot = self.cache.allocate(free[0] if free else None)
            self.cache.copy_prefix(free[0] if free else holders[0], slot, samples.prompt.size)
            started.append(self.start(samples.index, samples.next_sample, samples.prompt, slot))
            logits.append(samples.logits)
            samples.next_sample += 1
            if samples.next_sample == self.options.num_samples:
                self._samples = None

    def start(self, prompt_index: int, sample_index: int, prompt: Array, slot: int) -> Row:
        """Return a new row in a slot that holds its prompt."""
        options, room = self.options, self.model.config.max_seq_len - prompt.size
        self._prompts[slot] = prompt
        if self._numbers is not None:
            self._numbers.start(slot, options.seed, prompt_index, sample_index)
        if self._seen is not None:
            self._seen.start(slot, prompt)
        tail = None
        if self.tokenizer is not None and (options.stop or self._streaming):
            tail = TextTail(self.tokenizer, options.stop)
        reason = "length" if options.max_new_tokens <= room else "context"
        limit = min(options.max_new_tokens, room)
        row = Row(prompt_index, sample_index, slot, limit, reason, tail, [], [])
        self._rows.append(row)
        return row

    def _leave(self, rows: list[Row]) -> Iterator[Generation]:
        """Let go of rows that have stopped."""
        done = [row for row in rows if row.stop_reason is not None]
        if done or len(self._rows) != self._batch.num_tokens:
            for row in done:
                self.cache.release(row.slot)
            self._rows = [row for row in self._rows if row.stop_reason is None]
            self.arrange()
        for row in done:
            yield self.result(row)

    def arrange(self) -> None:
        """Line up the rows that run; :meth:`step` goes on with each one's last token."""
        self._batch = self._batch_of(len(self._rows))
        self._slots[: len(self._rows)] = [row.slot for row in self._rows]
        self._tokens[: len(self._rows)] = [row.ids[-1] for row in self._rows]

    def _batch_of(self, count: int) -> Batch:
        """Return the batch of a step of so many rows."""
        return Batch(
            self._tokens[:count],
            self._offsets[: count + 1],
            self._slots[:count],
            self._mask[:count],
            decoding=True,
        )

    def result(self, row: Row) -> Generation:
        """Return what a row has become."""
        text = None
        if self.tokenizer is not None:
            tail = row.tail
            if tail is None:
                tail = TextTail(self.tokenizer)
                for token in row.ids[: -1 if row.stop_reason == "stop_token" else None]:
                    tail.push(token)
                tail.finish()
            text = tail.text
        ids = np.array(row.ids, np.int32)
        logprobs = np.array(row.logprobs, self.model.dtype)
        reason = row.stop_reason or row.limit_reason
        return Generation(row.prompt_index, row.sample_index, ids, logprobs, text, reason)

    # -- passes ----------------------------------------------------------------------------------

    def step(self) -> list[Row]:
        """Add one token to every running row, and return these rows."""
        slots = self._batch.sample_ids
        longest = self.cache.begin(slots)
        logits = self._steps.repeater(slots.size, longest)(self._logits)
        self.cache.commit()
        rows = self.choose(self._rows, logits, slots)
        self._tokens[: len(rows)] = [row.ids[-1] for row in rows]
        return rows

    def _logits(self) -> Array:
        """Return the logits behind the token of each row, which the cache takes in."""
        with no_grad():
            hidden = self.model.get_hidden_states(self._batch, cache=self.cache)
            return self.model.logits(hidden, decoding=True).data

    def choose(self, rows: list[Row], logits: Array, slots: Array | None = None) -> list[Row]:
        """Choose the next token of some rows from their logits, which are changed."""
        options = self.options
        if slots is None:
            slots = np.array([row.slot for row in rows], np.int32)
        if self._seen is not None:
            self._seen.penalise(logits, slots)
        numbers = np.zeros(len(rows)) if self._numbers is None else self._numbers.next(slots)
        top_k = min(options.top_k, logits.shape[1])  # a kernel takes no whole number of any size
        ids, logprobs = get_backend().sample(
            logits, options.temperature, top_k, options.top_p, options.min_p, numbers
        )
        if not np.isfinite(logprobs).all():
            row = rows[int(np.flatnonzero(~np.isfinite(logprobs))[0])]
            raise NumericalError(
                f"the logits of prompt {row.prompt_index} after {len(row.ids)} new tokens "
                "are not finite"
            )
        for row, token, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
            if self._seen is not None:
                self._seen.add(row.slot, token)
            row.stop_reason = self._reason(row, token)
        return rows

    def _reason(self, row: Row, token: int) -> str | None:
        """Return why a row ends with this token, or None."""
        tail = row.tail
        if token in self._stops:
            if tail is not None:
                tail.finish()
            return "stop_token"
        if tail is not None and tail.push(token):
            return "stop_string"
        if len(row.ids) < row.limit:
            return None
        if tail is not None and tail.finish():
            return "stop_string"
        return row.limit_reason

    def _prefill_sharing(self, prompts: list[Array], slots: list[int]) -> Array:
        """Fill slots with prompts, copying what stands in the cache or comes in this wave."""
        sources = [self._source(j, prompts, slots) for j in range(len(prompts))]
        levels = [0] * len(prompts)
        for j, (_, _, earlier) in enumerate(sources):
            levels[j] = 0 if earlier is None else levels[earlier] + 1
        logits: list[Array | None] = [None] * len(prompts)
        for level in range(max(levels) + 1):
            members = [j for j, its in enumerate(levels) if its == level]
            for j in members:
                length, source, _ = sources[j]
                self.cache.copy_prefix(source, slots[j], length)
            found = self.prefill([prompts[j] for j in members], [slots[j] for j in members])
            for j, row in zip(members, found, strict=True):
                logits[j] = row
        return np.stack([row for row in logits if row is not None])

    def _source(
        self, j: int, prompts: list[Array], slots: list[int]
    ) -> tuple[int, int, int | None]:
        """Return how much of prompt j is to be copied, from which slot, after which prompt.

        Slots of this wave are being written over: only their new prompts count, or prompt j's own
        slot as it stands.
        """
        best: tuple[int, int, int | None] = (0, slots[j], None)
        if not self._share:
            return best
        written = set(slots) - {slots[j]}
        candidates: list[tuple[Array, int, int | None]] = [
            (self._prompts[s], s, None) for s in range(self.cache.slots) if s not in written
        ]
        candidates += [(prompts[i], slots[i], i) for i in range(j)]
        for prompt, slot, earlier in candidates:
            # The last token is always computed, since its logits are wanted.
            common = min(common_prefix(prompt, prompts[j]), prompts[j].size - 1)
            if common > best[0]:
                best = (common, slot, earlier)
        return best

    def prefill(self, prompts: list[Array], slots: list[int]) -> Array:
        """Take in what is missing of each prompt in its slot; return the logits behind each."""
        last: list[Array | None] = [None] * len(prompts)
        waiting = deque(range(len(prompts)))
        while waiting:
            members, counts, room = [], [], PASS_TOKENS
            while waiting and room > 0:
                j = waiting[0]
                start = int(self.cache.lengths[slots[j]])
                end = prompts[j].size
                if end - start > room:
                    end = start + room
                else:
                    waiting.popleft()
                members.append(j)
                counts.append(end - start)
                room -= end - start
                if end < prompts[j].size:
                    break
            hidden = self._pass([prompts[j] for j in members], [slots[j] for j in members], counts)
            for j, row in zip(members, hidden, strict=True):
                last[j] = row  # that of the prompt's last pass stays
        with no_grad():
            rows = np.stack([row for row in last if row is not None])
            return self.model.logits(Tensor(rows)).data

    def _pass(self, prompts: list[Array], slots: list[int], counts: list[int]) -> Array:
        """Take in the next tokens of each prompt; return the last hidden state of each."""
        where = np.array(slots, np.int32)
        starts = self.cache.lengths[where].tolist()
        parts = [p[a : a + n] for p, a, n in zip(prompts, starts, counts, strict=True)]
        tokens = np.concatenate(parts)
        offsets = np.append(0, np.cumsum(counts)).astype(np.int32)
        batch = Batch(tokens, offsets, where, np.zeros(tokens.size, bool))
        with no_grad():
            self.cache.begin(where, np.array(counts, np.int32))
            last = self.model.get_hidden_states(batch, cache=self.cache, rows=offsets[1:] - 1).data
        self.cache.commit()
        return last
