"""Conversations from files: every layout comes to the same, and faults have lines."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopos.data.conversations import Conversation, Conversations, read_conversations
from loopos.data.readers import split
from loopos.errors import DataError, MissingFileError

USER, ANSWER = {"role": "user", "content": "Hi 😀"}, {"role": "assistant", "content": "Yes"}


def message_of(rows, kind=DataError):
    with pytest.raises(kind) as caught:
        read_conversations(rows)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def only(row):
    (found,) = read_conversations([row]).conversations
    return found


def test_layouts_come_to_the_same():
    shared = [{"from": "human", "value": "Hi 😀"}, {"from": "gpt", "value": "Yes"}]
    expected = Conversation([USER, ANSWER])
    assert only({"messages": [USER, ANSWER]}) == expected
    assert only({"conversations": shared}) == expected
    assert only({"messages": [USER, ANSWER], "prompt": "other"}) == expected
    assert only({"prompt": [USER], "completion": [ANSWER]}) == Conversation([USER, ANSWER], 1)
    assert only({"prompt": "Hi 😀", "completion": "Yes"}) == Conversation([USER, ANSWER], 1, True)
    assert only({"prompt": [USER], "completion": "Yes"}) == Conversation([USER, ANSWER], 1)
    history = [USER, ANSWER, USER]
    assert only({"prompt": history, "completion": "Yes"}) == Conversation([*history, ANSWER], 3)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_files_are_read_with_their_lines(tmp_path, ending):
    rows = [{"messages": [USER, ANSWER | {"content": f"Yes {i}"}]} for i in range(3)]
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif ending == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read_conversations(path)
    assert found.messages == [row["messages"] for row in rows]
    assert len(found.where) == 3
    assert found.where[2] == f"{path}:{1 if ending == 'json' else 3}"


def test_what_else_a_message_says_is_kept():
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "3", "name": "add"},
        ANSWER | {"thinking": "hm"},
    ]
    found = only({"messages": messages, "tools": [{"name": "add", "x": None}]})
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert found.messages[3] == ANSWER | {"thinking": "hm"}
    assert found.tools == [{"name": "add", "x": None}]


def test_what_columns_leave_empty_is_not_said(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    calls = [{"function": {"name": name, "arguments": {name: 1}}} for name in ("a", "b")]
    said = ANSWER | {"tool_calls": calls}
    tools = [{"name": "a", "x": 1}, {"name": "b"}]
    table = arrow.Table.from_pylist([{"messages": [USER, said], "tools": tools}])
    parquet.write_table(table, tmp_path / "t.parquet")
    for source in (table, tmp_path / "t.parquet"):
        (found,) = read_conversations(source).conversations
        assert found.messages == [USER, said]
        assert found.tools == tools


def test_conversations_are_texts_to_split_and_compare():
    rows = [{"messages": [USER, ANSWER | {"content": f"Yes {i % 5}"}]} for i in range(20)]
    data = read_conversations(rows)
    assert isinstance(data, Conversations)
    assert data.texts[0] == data.texts[5] != data.texts[1]
    training, validation = split(data, 0.2, seed=0)
    assert isinstance(training, Conversations)
    assert not set(training.texts) & set(validation.texts)
    assert sorted([*training.texts, *validation.texts]) == sorted(data.texts)
    assert data.take([3]).messages == [rows[3]["messages"]]
    assert list(data.take([3]).corpus) == ["Hi 😀", "Yes 3"]
    assert data.conversations[:2] == list(data.conversations)[:2]
    assert list(data.parts()) == [f"{text}\0" for text in data.texts]
    again = read_conversations([{"messages": [dict(reversed(m.items())) for m in r["messages"]]}
                                for r in rows])  # fmt: skip
    assert again.texts == data.texts


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"mesages": []},
            "no field 'messages', 'conversations' or 'prompt'; did you mean 'messages'? "
            "(found: mesages)",
        ),
        ({}, "no field 'messages', 'conversations' or 'prompt' (found: nothing)"),
        ({"prompt": "a"}, "no field 'completion' (found: prompt)"),
        ({"prompt": " ", "completion": "b"}, "there is no text in 'prompt'"),
        ({"prompt": "a", "completion": "\n"}, "there is no text in 'completion'"),
        ({"prompt": 3, "completion": "b"}, "expected 'prompt' to be a list of messages, found 3"),
        ({"messages": "Hi"}, "expected 'messages' to be a list of messages, found 'Hi'"),
        ({"messages": ["Hi"]}, "expected 'messages' to be a list of messages, found ['Hi']"),
        ({"messages": []}, "there is no message in 'messages'"),
        (
            {"messages": [USER, {"role": "asistant", "content": "a"}]},
            "message 2: unknown role 'asistant'; did you mean 'assistant'? "
            "(known: system, developer, user, assistant, tool)",
        ),
        (
            {"messages": [USER, {"role": 3, "content": "a"}]},
            "message 2: unknown role 3 (known: system, developer, user, assistant, tool)",
        ),
        (
            {"messages": [USER, {"rol": "assistant", "content": "a"}]},
            "message 2: no 'role'; did you mean 'rol'? (found: rol, content)",
        ),
        (
            {"conversations": [USER]},
            "message 1: no 'from' (found: role, content)",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2: no 'content' (found: role)"),
        ({"messages": [USER, ANSWER | {"content": " "}]}, "message 2 (assistant) has no text"),
        (
            {"messages": [USER, ANSWER | {"content": 3}]},
            "message 2: expected 'content' to be text, found 3",
        ),
        (
            {"messages": [USER, ANSWER | {"content": None}]},
            "message 2: expected 'content' to be text, found None",
        ),
        (
            {"prompt": [USER], "completion": [ANSWER, ANSWER | {"content": 3}]},
            "message 3: expected 'content' to be text, found 3",
        ),
        ({"messages": [USER]}, "no message of the assistant, so nothing to learn from"),
        (
            {"prompt": [USER, ANSWER], "completion": [USER]},
            "no message of the assistant, so nothing to learn from",
        ),
        (
            {"messages": [ANSWER, USER]},
            "message 1 is of the assistant, expected the user or the system to begin",
        ),
        (
            {"messages": [USER, ANSWER | {"content": "\ud800"}]},
            "message 2: has half a surrogate pair, so no text",
        ),
        (
            {"messages": [USER, ANSWER], "tools": "add"},
            "expected 'tools' to be a list of objects, found 'add'",
        ),
        (
            {"messages": [USER, ANSWER], "tools": [{"name": "\ud800"}]},
            "tools: has half a surrogate pair, so no text",
        ),
        (
            {"messages": [USER, ANSWER | {"x": {1}}]},
            "message 2: is not made of texts, numbers and lists "
            "(Object of type set is not JSON serializable)",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(row, message):
    assert message_of([{"messages": [USER, ANSWER]}, row]) == f"row 2: {message}"


def test_faults_of_files_are_said(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER]}) + '\n{"messages": []}\n')
    assert message_of(path) == f"{path}:2: there is no message in 'messages'"
    path.write_text("")
    assert message_of(path) == f"{path}: there is no row in it"
    assert message_of(tmp_path / "u.jsonl", MissingFileError).endswith("did you mean 't.jsonl'?")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.sampled_from(["user", "assistant", "system", "human", "gpt", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tool_calls", "x"]), inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
FIELDS = st.sampled_from(["messages", "conversations", "prompt", "completion", "tools", "text"])


@given(st.dictionaries(FIELDS, VALUES, max_size=3))
def test_whatever_a_row_holds_it_is_read_or_refused(row):
    refused = None
    try:
        (conversation,) = read_conversations([row]).conversations
    except DataError as error:
        refused = str(error)
    if refused is not None:
        assert refused.startswith("row 1: ")
        assert "\n" not in refused
        return
    assert Conversation.of_text(conversation.text()) == conversation
    assert any(m["role"] == "assistant" for m in conversation.messages[conversation.first :])
    assert all(isinstance(m["content"], str) for m in conversation.messages)
