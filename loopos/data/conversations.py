"""Conversations to learn from: messages with roles, or prompts with their completions.

Rows have ``messages`` (``role`` and ``content`` each), ``conversations`` as ShareGPT writes them
(``from`` and ``value``), or ``prompt`` and ``completion``, each a text or a list of messages.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from loopos.data.labels import check_unicode, field_of, first_few
from loopos.data.readers import Texts
from loopos.data.rows import Row, Source, iter_rows, name_of
from loopos.data.store import PlacesBuilder, TextStore, TextStoreBuilder, taken
from loopos.errors import DataError, nearest

__all__ = ["Conversation", "Conversations", "read_conversations"]

Array = np.ndarray[Any, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
#: Who may speak first.
_OPENING = ("system", "developer", "user")
#: The names that ShareGPT has for roles.
_SHARED_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "observation": "tool",
} | {role: role for role in ROLES}  # fmt: skip
_FIELDS = ("messages", "conversations", "prompt")


@dataclass(frozen=True)
class Conversation:
    """A conversation.

    Attributes
    ----------
    messages : list of dict
        ``role`` and ``content`` of each, and what else the row says of it.
    first : int
        Index of the first message that may be trained on: of a prompt and its completion, the
        completion's.
    plain : bool
        Whether the row has a prompt and a completion that are texts.
    tools : list or None
        Descriptions of functions that the assistant may call.
    """

    messages: list[dict[str, Any]]
    first: int = 0
    plain: bool = False
    tools: list[Any] | None = None

    def text(self) -> str:
        """Return all of it as one text, the same for equal conversations."""
        kept: dict[str, Any] = {"messages": self.messages}
        kept |= {n: getattr(self, n) for n in ("first", "plain", "tools") if getattr(self, n)}
        return json.dumps(kept, ensure_ascii=False, sort_keys=True)

    @classmethod
    def of_text(cls, text: str) -> Conversation:
        """Return the conversation that :meth:`text` made a text of."""
        return cls(**json.loads(text))


class _Read(Sequence[Conversation]):
    """Conversations, read from their texts when asked for."""

    def __init__(self, texts: Sequence[str]):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[Conversation]:
        return map(Conversation.of_text, self._texts)

    @overload
    def __getitem__(self, key: int) -> Conversation: ...
    @overload
    def __getitem__(self, key: slice) -> list[Conversation]: ...
    def __getitem__(self, key: int | slice) -> Conversation | list[Conversation]:
        if isinstance(key, slice):
            return list(map(Conversation.of_text, self._texts[key]))
        return Conversation.of_text(self._texts[key])


@dataclass(frozen=True)
class Conversations(Texts):
    """Conversations, and where each stands.

    Attributes
    ----------
    texts : sequence of str
        Each as one text, as :meth:`Conversation.text` writes it; equal for equal conversations.
    """

    @property
    def conversations(self) -> Sequence[Conversation]:
        """The conversations."""
        return _Read(self.texts)

    @property
    def messages(self) -> list[list[dict[str, Any]]]:
        """The messages of each conversation."""
        return [conversation.messages for conversation in self.conversations]

    @property
    def corpus(self) -> Sequence[str]:
        """What is said in all messages, for making a tokenizer."""
        return TextStore.of(m["content"] for c in self.conversations for m in c.messages)

    def take(self, indices: Sequence[int] | Array) -> Conversations:
        """Return the conversations at `indices`; of stored ones a view."""
        texts, where = taken(self.texts, indices), taken(self.where, indices)
        return Conversations(texts, where, dropped=self.dropped)


def read_conversations(source: Source) -> Conversations:
    """Read conversations.

    Parameters
    ----------
    source : path, sequence of paths, table or iterable of mappings
        As :func:`loopos.data.readers.iter_rows`. Of a row the first of the fields ``messages``,
        ``conversations`` and ``prompt`` counts, the last one with ``completion``; ``tools`` are
        descriptions of functions.

    Raises
    ------
    MissingFileError, DataError
        As ``iter_rows``; also for a message without text or with another role than "system",
        "developer", "user", "assistant" and "tool", and a conversation that does not begin with
        the user or the system, or in which the assistant says nothing.
    OutputError
        If there is more than memory should hold, and no room for a temporary file.
    """
    texts, where = TextStoreBuilder(), PlacesBuilder()
    with closing(iter_rows(source)) as rows:
        for row in rows:
            texts.append(_conversation(row).text())
            where.append(row.file, row.number)
    if not len(texts):
        raise DataError(f"{name_of(source)}: there is no row in it")
    return Conversations(texts.finish(), where.finish())


def _conversation(row: Row) -> Conversation:
    given = [name for name in _FIELDS if row.fields.get(name) is not None]
    if not given:
        names = [str(field) for field in row.fields]
        near = next(filter(None, (nearest(name, _FIELDS) for name in names)), "")
        raise DataError(
            f"{row.where}: no field 'messages', 'conversations' or 'prompt'{near} "
            f"(found: {first_few(names, 10) or 'nothing'})"
        )
    first, plain = 0, False
    if given[0] == "prompt":
        prompt, completion = row.fields["prompt"], field_of(row, "completion")
        plain = isinstance(prompt, str) and isinstance(completion, str)
        messages = _side(row, "prompt", prompt, "user")
        first = len(messages)
        messages += _side(row, "completion", completion, "assistant", first)
    elif given[0] == "conversations":
        messages = _messages(row, "conversations", row.fields["conversations"], shared=True)
    else:
        messages = _messages(row, "messages", row.fields["messages"])
    if messages[0]["role"] not in _OPENING:
        raise DataError(
            f"{row.where}: message 1 is of the {messages[0]['role']}, "
            "expected the user or the system to begin"
        )
    if all(message["role"] != "assistant" for message in messages[first:]):
        raise DataError(f"{row.where}: no message of the assistant, so nothing to learn from")
    return Conversation(messages, first, plain, _tools(row))


def _tools(row: Row) -> list[Any] | None:
    tools = row.fields.get("tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(
            f"{row.where}: expected 'tools' to be a list of objects, found {reprlib.repr(tools)}"
        )
    found: list[Any] = _without_none(tools) if row.of_columns else tools
    _check_json(found, f"{row.where}: tools")
    return found


def _side(row: Row, name: str, value: Any, role: str, before: int = 0) -> list[dict[str, Any]]:
    """Return the messages of a prompt or a completion."""
    if not isinstance(value, str):
        return _messages(row, name, value, before=before)
    check_unicode(value, row, name)
    if not value.strip():
        raise DataError(f"{row.where}: there is no text in '{name}'")
    return [{"role": role, "content": value}]


def _messages(
    row: Row, name: str, value: Any, *, shared: bool = False, before: int = 0
) -> list[dict[str, Any]]:
    if isinstance(value, np.ndarray):  # what some tables hold lists in
        value = value.tolist()
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise DataError(
            f"{row.where}: expected '{name}' to be a list of messages, found {reprlib.repr(value)}"
        )
    if not value:
        raise DataError(f"{row.where}: there is no message in '{name}'")
    return [_message(row, number, entry, shared) for number, entry in enumerate(value, before + 1)]


def _message(row: Row, number: int, entry: Mapping[str, Any], shared: bool) -> dict[str, Any]:
    place = f"{row.where}: message {number}"
    role_key, text_key = ("from", "value") if shared else ("role", "content")
    for key in (role_key, text_key):
        if key not in entry:
            keys = list(map(str, entry))
            raise DataError(
                f"{place}: no '{key}'{nearest(key, keys)} (found: {first_few(keys, 10)})"
            )
    known: Mapping[str, str] = _SHARED_ROLES if shared else {role: role for role in ROLES}
    role, content = entry[role_key], entry[text_key]
    if not isinstance(role, str) or role not in known:
        raise DataError(
            f"{place}: unknown role {reprlib.repr(role)}{nearest(str(role), known)} "
            f"(known: {', '.join(known)})"
        )
    more = {str(k): v for k, v in entry.items() if k not in (role_key, text_key) and v is not None}
    found: dict[str, Any] = _without_none(more) if row.of_columns else more
    if content is None and found.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{place}: expected '{text_key}' to be text, found {reprlib.repr(content)}")
    if not content.strip() and not found.get("tool_calls"):
        raise DataError(f"{place} ({known[role]}) has no text")
    message = {"role": known[role], "content": content, **found}
    _check_json(message, place)
    return message


def _check_json(value: Any, place: str) -> None:
    """Refuse what no file of JSON could hold."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: has half a surrogate pair, so no text") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not made of texts, numbers and lists ({error})") from error


def _without_none(value: Any) -> Any:
    """Leave out, at any depth, what the columns of a table have to hold as None."""
    if isinstance(value, Mapping):
        return {str(k): _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value
