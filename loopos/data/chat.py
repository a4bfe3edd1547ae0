"""Conversations as a model's own template writes them, and which of their tokens the model writes.

What the model writes is found by rendering prefixes: an assistant's turn is what the conversation
up to it has beyond the conversation before it with the prompt to answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, DataError

__all__ = ["ChatTemplate", "TrainOn", "chat_template", "renderer"]

Array = np.ndarray[Any, Any]
Message = Mapping[str, Any]
TrainOn = Literal["assistant", "last_assistant", "all"]

#: Names under which a message may hold what was thought before the answer, the first one counts.
_REASONING = ("reasoning_content", "reasoning", "thinking")


class ChatTemplate:
    """A tokenizer's chat template.

    Parameters
    ----------
    tokenizer : Tokenizer
        With a ``chat_template``.

    Raises
    ------
    ConfigError
        If it has none.
    ModelFormatError
        If the template cannot be read.
    """

    def __init__(self, tokenizer: Tokenizer):
        if not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template: write one to chat_template.jinja in the "
                "directory that data.tokenizer or data.pretrained_weights names ('loopos tokenizer "
                "train' makes such a directory), or set tokenizer.chat_template in Python"
            )
        from loopos.data.templates import Template  # jinja2 is imported where it is needed

        self.tokenizer = tokenizer
        self._template = Template(tokenizer.chat_template)
        self._tokens = tokenizer.special_tokens
        self._added = tokenizer.added_ids

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Return messages as one text.

        Parameters
        ----------
        messages : sequence of mapping
            With ``role`` and ``content``, and whatever else the template knows.
        add_generation_prompt : bool
            End with what an answer of the assistant begins with.
        tools : sequence, optional
            Descriptions of functions that the assistant may call.

        Raises
        ------
        DataError
            If the template refuses these messages.
        ModelFormatError
            If the template fails.
        """
        prepared = [_message(message) for message in messages]
        return self._render(
            prepared, add_generation_prompt, None if tools is None else _plain(tools)
        )

    def _render(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: Any
    ) -> str:
        return self._template.render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._tokens,
        )

    def prompt(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None) -> Array:
        """Return the ids, int32 [n], after which the model is to answer `messages`.

        Raises
        ------
        DataError, ModelFormatError
            As :meth:`render`; also if there is no token in the text.
        """
        text = self.render(messages, add_generation_prompt=True, tools=tools)
        ids, _ = self.tokenizer.encode_with_offsets(text)
        if not ids.size:
            raise DataError("the chat template writes nothing of these messages")
        return ids

    def encode(
        self,
        messages: Sequence[Message],
        *,
        train_on: TrainOn = "assistant",
        first: int = 0,
        tools: Sequence[Any] | None = None,
    ) -> tuple[Array, Array]:
        """Return the token ids of a conversation, and which of them are trained on.

        Of an assistant's turn that is everything that the model has to write: the text and the
        token that closes it, not the prompt to answer before, nor white space after that token.

        Parameters
        ----------
        messages : sequence of mapping
        train_on : {"assistant", "last_assistant", "all"}
            All turns of the assistant, its last one, or all tokens.
        first : int
            Index of the first message whose turn may be trained on.
        tools : sequence, optional
            As in :meth:`render`.

        Returns
        -------
        ids : ndarray int32 [n]
        trained : ndarray bool [n]

        Raises
        ------
        DataError
            If the template refuses these messages, or writes a turn in another way when there are
            others after it, naming the message.
        ModelFormatError
            If the template fails.
        """
        prepared = [_message(message) for message in messages]
        given = None if tools is None else _plain(tools)
        text = self._render(prepared, False, given)
        if train_on == "all":
            ids, _ = self.tokenizer.encode_with_offsets(text)
            return ids, np.ones(ids.size, dtype=bool)
        turns = [i for i in range(first, len(prepared)) if prepared[i].get("role") == "assistant"]
        chosen = turns[-1:] if train_on == "last_assistant" else turns
        spans = [self._span(prepared, i, text, given) for i in chosen]
        return self._encoded(text, [span for span in spans if span[0] < span[1]])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the token that closes an assistant's turn, where that is a token of its own.

        It is the last one of an exchange, whatever an answer is prompted with: some templates end
        their prompt in an open ``<think>`` that they never write of turns that were.
        """
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        last = self._closing(self.render(exchange).rstrip())
        return () if last is None else (last,)

    def _span(
        self, messages: list[dict[str, Any]], index: int, text: str, tools: Any
    ) -> tuple[int, int]:
        """Return where in `text` an assistant's turn begins and ends."""
        before = self._render(messages[:index], True, tools)
        after = text
        if index + 1 < len(messages):
            after = self._render(messages[: index + 1], False, tools)
        if not (after.startswith(before) and text.startswith(after)):
            hint = "" if index + 1 == len(messages) else "; train_on 'last_assistant' may do"
            raise DataError(
                f"message {index + 1}: the chat template writes it in another way when it is "
                f"followed by others or answers a prompt, so that its tokens cannot be told{hint}"
            )
        return len(before), len(before) + len(self._without_tail(after[len(before) :]))

    def _without_tail(self, turn: str) -> str:
        """Return a turn without white space after its closing token: nobody asks a model for it."""
        stripped = turn.rstrip()
        return turn if self._closing(stripped) is None else stripped

    def _closing(self, text: str) -> int | None:
        """Return the token at the very end of a text if it is one that stands for itself."""
        end = text[-64:]
        ids, offsets = self.tokenizer.encode_with_offsets(end)
        if not ids.size or offsets[-1, 1] != len(end) or int(ids[-1]) not in self._added:
            return None
        return int(ids[-1])

    def _encoded(self, text: str, spans: list[tuple[int, int]]) -> tuple[Array, Array]:
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        starts, ends = offsets.T
        trained: Array = np.zeros(ids.size, dtype=bool)
        for begin, end in spans:
            if (((starts < begin) & (ends > begin)) | ((starts < end) & (ends > end))).any():
                return self._in_pieces(text, spans)
            trained |= (starts >= begin) & (starts < end)
        return ids, trained

    def _in_pieces(self, text: str, spans: list[tuple[int, int]]) -> tuple[Array, Array]:
        """Encode what the model reads and what it writes apart, where a token would cross both."""
        edges = [0, *(place for span in spans for place in span), len(text)]
        found, marks = [], []
        for number, (begin, end) in enumerate(pairwise(edges)):
            ids, _ = self.tokenizer.encode_with_offsets(text[begin:end])
            found.append(ids)
            marks.append(np.full(ids.size, number % 2 == 1))
        return np.concatenate(found), np.concatenate(marks)


def chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the template of a tokenizer; None where it has none."""
    return ChatTemplate(tokenizer) if tokenizer.chat_template else None


def renderer(tokenizer: Tokenizer) -> Callable[..., str] | None:
    """Return what writes conversations as one text; None where the tokenizer has no template."""
    template = chat_template(tokenizer)
    return None if template is None else template.render


def _message(message: Message) -> dict[str, Any]:
    """Return a message made of JSON values, its reasoning under every name that is used for it."""
    found: dict[str, Any] = _plain(message)
    thought = next((found[name] for name in _REASONING if found.get(name) is not None), None)
    if thought is not None:
        found = {"thinking": thought, **found, "reasoning_content": thought}
    return found


def _plain(value: Any) -> Any:
    """Return a copy of a value that is made of JSON values only: nothing else has methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"a message is not made of texts, numbers and lists ({error})") from error
