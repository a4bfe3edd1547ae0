"""Prompts with their responses as token ids, and batches of them; what such data holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import numpy as np

from loopos.data.batch import Batch
from loopos.data.preferences import Judgements, Preferences, Render
from loopos.data.readers import Texts
from loopos.data.report import DataReport, Finding
from loopos.data.store import TextStore, TokenStore, TokenStoreBuilder, first_of_each
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, DataError

__all__ = ["Overflow", "PreferenceReport", "Responses", "encode_responses"]

Array = np.ndarray[Any, Any]
Overflow = Literal["drop", "error"]

#: Prompts that are encoded at once.
_CHUNK = 1024


@dataclass(frozen=True, eq=False)  # arrays have no single truth to compare by
class Responses:
    """Samples of one or two responses, each with its prompt before it.

    Attributes
    ----------
    tokens : TokenStore
        Prompt and response; the responses of a sample stand one after the other.
    prompts : ndarray int64
        How many of each are the prompt's.
    per_sample : int
        Responses of a sample.
    rows : ndarray int64 [n]
        Which row of the data each sample is.
    too_long : ndarray int64
        Rows that were left out as one of their responses is too long.
    """

    tokens: TokenStore
    prompts: Array
    per_sample: int
    rows: Array
    too_long: Array

    @property
    def lengths(self) -> Array:
        """Tokens of each sample, all responses together, int64 [n]."""
        total: Array = self.tokens.lengths.reshape(-1, self.per_sample).sum(axis=1)
        return total

    @property
    def response_lengths(self) -> Array:
        """Tokens of each response, int64."""
        lengths: Array = self.tokens.lengths - self.prompts
        return lengths

    def batch(self, indices: Array, sample_ids: Array | None = None) -> Batch:
        """Return the responses of some samples as one ragged batch.

        ``labels`` are the places of the responses in `tokens`, ``loss_mask`` is True at the tokens
        of responses.
        """
        each = np.arange(self.per_sample)
        which = self._spread(np.asarray(indices, dtype=np.int64), each)
        ids = None if sample_ids is None else self._spread(np.asarray(sample_ids), each)
        return self.batch_of(which, ids)

    def batch_of(self, which: Array, sample_ids: Array | None = None) -> Batch:
        """Return single responses, by their places in `tokens`, as :meth:`batch` does."""
        sequences = [self.tokens[i] for i in which.tolist()]
        masks = [
            np.arange(len(ids)) >= begin
            for ids, begin in zip(sequences, self.prompts[which], strict=True)
        ]
        return Batch.from_sequences(sequences, which, masks, sample_ids)

    def _spread(self, samples: Array, each: Array) -> Array:
        return (samples[:, None] * self.per_sample + each).reshape(-1)

    def mismatched(self, max_length: int) -> Responses:
        """Return each sample's prompt with the response to another one, cut to `max_length`.

        It is that of the next sample with another prompt, such as where pairs were taken apart; of
        the next one where all have the same.
        """
        builder, others = TokenStoreBuilder(), self._others()
        for place, begin in enumerate(self.prompts.tolist()):
            other = others[place]
            response = self.tokens[other][self.prompts[other] :]
            builder.append(np.concatenate([self.tokens[place][:begin], response])[:max_length])
        return replace(self, tokens=builder.finish())

    def _others(self) -> list[int]:
        """Return for each response the place of the next one to another prompt, going around."""
        count = len(self.tokens)
        others = [(i + 1) % count for i in range(count)]
        changes = [
            not np.array_equal(self._prompt(here), self._prompt(following))
            for here, following in enumerate(others)
        ]
        ahead: int | None = None
        for step in range(2 * count - 1, -1, -1):  # twice around: the last ones look at the first
            here = step % count
            if changes[here]:
                ahead = (here + 1) % count
            if ahead is not None:
                others[here] = ahead
        return others

    def _prompt(self, place: int) -> Array:
        prompt: Array = self.tokens[place][: self.prompts[place]]
        return prompt


def encode_responses(
    tokenizer: Tokenizer,
    data: Preferences | Judgements,
    max_length: int,
    overflow: Overflow = "drop",
    render: Render | None = None,
) -> Responses:
    """Encode prompts and responses, each response closed by the tokenizer's end-of-text token.

    Prompt and response are encoded apart, as generation has them: a token never holds the end of
    the one and the beginning of the other. Stored texts remember what they were encoded to.

    Parameters
    ----------
    tokenizer : Tokenizer
    data : Preferences or Judgements
    max_length : int
        Tokens of prompt and response together.
    overflow : {"drop", "error"}
        Whether rows with a longer response are left out, or refused.
    render : callable, optional
        A chat template, which writes conversations: all their special tokens are its own, and what
        closes a response too, white space after it left out. Without it they are lines of role and
        text.

    Raises
    ------
    ConfigError
        If there are conversations and the tokenizer has a chat template, but no `render` is given.
    DataError
        If a prompt or a response has no token, a row is refused, or none is left.
    """
    memo = data.texts.memo if isinstance(data.texts, TextStore) else {}
    asked = (tokenizer, data.responses, max_length, overflow, render)
    known = memo.get("responses")
    if known is not None and all(
        old is new or old == new
        for old, new in zip(known[0][1:], asked[1:], strict=True)
    ) and known[0][0] is tokenizer:  # fmt: skip
        return cast(Responses, known[1])
    if data.conversations is not None and render is None and tokenizer.chat_template:
        raise ConfigError(
            "these are conversations and the tokenizer has a chat template: "
            "give the trainer what renders it, chat=..."
        )
    written = data if render is None else data.written(render)
    builder, prompts, rows, too_long = TokenStoreBuilder(), list[int](), list[int](), list[int]()
    for start in range(0, len(data.texts), _CHUNK):
        for row, prompt, responses in _chunk(tokenizer, written, start, render is not None):
            longest = len(prompt) + max(map(len, responses))
            if longest > max_length:
                too_long.append(row)
                if overflow == "error":
                    raise DataError(
                        f"{data.where[row]}: prompt and response have {longest} tokens, "
                        f"expected {max_length} at most"
                    )
                continue
            rows.append(row)
            for response in responses:
                builder.append(np.concatenate([prompt, response]))
                prompts.append(len(prompt))
    if not rows:
        raise DataError(f"every row is longer than {max_length} tokens")
    encoded = Responses(
        builder.finish(), np.array(prompts, dtype=np.int64), len(data.responses),
        np.array(rows, dtype=np.int64), np.array(too_long, dtype=np.int64),
    )  # fmt: skip
    memo["responses"] = asked, encoded
    return encoded


def _chunk(
    tokenizer: Tokenizer, data: Preferences | Judgements, start: int, templated: bool
) -> list[tuple[int, Array, list[Array]]]:
    """Return row, prompt and responses of some rows as ids."""
    some = slice(start, start + _CHUNK)
    prompts = list(data.texts[some])
    chats = [False] * len(prompts)
    if templated and data.conversations is not None:
        chats = [bool(messages) for messages in data.conversations[some]]
    asked = tokenizer.encode_open(prompts)
    if any(chats):
        bare = tokenizer.encode_batch(prompts, special_tokens=False)
        asked = [bare[i] if chat else asked[i] for i, chat in enumerate(chats)]
    answers = []
    for side in data.responses:
        texts = [text.rstrip() if chat else text
                 for text, chat in zip(side[some], chats, strict=True)]  # fmt: skip
        answers.append(tokenizer.encode_batch(texts, special_tokens=False))
    found = []
    for index, (prompt, chat) in enumerate(zip(asked, chats, strict=True)):
        row = start + index
        responses = [side[index] for side in answers]
        if not chat:
            responses = [tokenizer.closed(ids) for ids in responses]
        for what, ids in (("prompt", prompt), *(("response", ids) for ids in responses)):
            if not len(ids):
                raise DataError(f"{data.where[row]}: the tokenizer finds no token in the {what}")
        found.append((row, prompt, responses))
    return found


# -- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceReport(DataReport):
    """What preference data hold.

    ``duplicates`` are rows that repeat prompt and responses; ``leaks`` are validation rows whose
    prompt stands in the training set; ``tokens`` and ``lengths`` count prompts and all responses of
    a row together.

    Attributes
    ----------
    ties : Finding
        Rows without a preference, left out.
    too_long : Finding
        Rows over `longest` tokens, left out; of both sets.
    longest : int
        Tokens of prompt and response at the most.
    """

    ties: Finding
    too_long: Finding
    longest: int

    @classmethod
    def of(
        cls,
        training: Preferences | Judgements,
        validation: Preferences | Judgements | None,
        encoded: Responses,
        held_out: Responses | None,
        max_length: int,
    ) -> PreferenceReport:
        """Look through the data, which has been encoded."""
        sets = [training] if validation is None else [training, validation]
        found = [encoded] if held_out is None else [encoded, held_out]
        kept = [data.take(part.rows) for data, part in zip(sets, found, strict=True)]
        base = DataReport.build(
            _whole(kept[0]), _whole(kept[1]) if len(kept) > 1 else None, encoded.lengths, None
        )
        first = first_of_each(*(data.texts for data in kept))
        rows = len(kept[0].texts)
        leaks = [(data, np.flatnonzero(first[rows:] < rows)) for data in kept[1:]]
        told = [getattr(data, "ties", []) for data in sets]
        if told[-1] is told[0]:  # two parts of one set have the same list
            told = told[:1]
        ties = [place for places in told for place in places]
        long = list(zip(sets, (part.too_long for part in found), strict=True))
        values = {f.name: getattr(base, f.name) for f in fields(DataReport)}
        values |= {"leaks": Finding.at(leaks), "warnings": []}
        report = cls(**values, ties=Finding.of(ties), too_long=Finding.at(long), longest=max_length)
        report.warnings.extend(report._warnings())
        if report.too_long.count:
            report.warnings.append(
                f"{report.too_long.count} rows are left out, whose prompt with a response has "
                f"more than {max_length} tokens"
            )
        return report

    def _table(self) -> list[tuple[str, str]]:
        # A prompt with one response is held against the limit, not a whole row.
        own = [("ties", str(self.ties)), (f"over {self.longest}", str(self.too_long))]
        table = [
            (name, f"{value} of a prompt with all its responses" if name == "tokens" else value)
            for name, value in super()._table()
        ]
        return [*table, *own]


def _whole(data: Preferences | Judgements) -> Texts:
    """Return rows with prompt and responses as one text."""
    columns: Sequence[Sequence[str]] = (data.texts, *data.responses)
    texts = TextStore.of("\0".join(row) for row in zip(*columns, strict=True))
    return Texts(texts, data.where, dropped=data.dropped)
