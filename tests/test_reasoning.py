"""Reading problems with their steps and answers: what a row means, and what is refused."""

import json
from decimal import Decimal

import numpy as np
import pytest

from loopos.data.reasoning import ReasoningExample, ReasoningExamples, read_reasoning
from loopos.data.splitting import split
from loopos.errors import DataError

TOM = ReasoningExample("Tom has 2 pens and 3 more.", ("Tom has 2 + 3 = 5 pens.",), "5")


def put(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"problem": TOM.problem, "reasoning": list(TOM.steps), "answer": "5"},
        {"problem": TOM.problem, "reasoning": TOM.steps[0] + "\n\n", "answer": 5},
        {"question": TOM.problem, "answer": "Tom has 2 + 3 = <<2+3=5>>5 pens.\n#### 5"},
        {"messages": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": TOM.problem},
            {"role": "assistant", "content": TOM.steps[0] + "\n#### 5"},
        ]},
        {"messages": [
            {"role": "user", "content": "Something else."},
            {"role": "user", "content": TOM.problem},
            {"role": "assistant", "content": TOM.steps[0] + "\n5"},
        ]},
    ],
)  # fmt: skip
def test_forms_of_rows(tmp_path, row):
    assert list(read_reasoning(put(tmp_path / "t.jsonl", row))) == [TOM]
    assert list(read_reasoning([row])) == [TOM]


@pytest.mark.parametrize(
    "last", ["5", "Answer: 5", "**Answer:** 5", "The answer is 5.", "\\boxed{5}", "#### 5"]
)
def test_the_last_line_of_an_assistant_is_the_answer_without_its_mark(last):
    said = [{"role": "user", "content": TOM.problem},
            {"role": "assistant", "content": f"{TOM.steps[0]}\n\n{last}\n"}]  # fmt: skip
    assert list(read_reasoning([{"messages": said}])) == [TOM]


@pytest.mark.parametrize(
    "rest",
    [
        "Thus \\boxed{5}.\nI hope that helps!", "\\[\n\\boxed{5}\n\\]", "\\[\n\\boxed{\n5\n}\n\\]",
        "Answer: 5\n\nThat was easy.", "The answer is 5.\nDoes that help?",
    ],
)  # fmt: skip
def test_an_answer_that_is_marked_in_an_earlier_line_is_found(rest):
    said = [{"role": "user", "content": TOM.problem},
            {"role": "assistant", "content": f"{TOM.steps[0]}\n{rest}"}]  # fmt: skip
    assert list(read_reasoning([{"messages": said}])) == [TOM]


def test_the_last_answer_belongs_to_the_question_right_before():
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "s\n1"},
            {"role": "user", "content": TOM.problem},
            {"role": "assistant", "content": TOM.steps[0] + "\n5"},
            {"role": "user", "content": "And 3 + 3?"}]  # fmt: skip
    assert list(read_reasoning([{"messages": said}])) == [TOM]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (1234567.0, "1234567"), (0.1234567, "0.1234567"), (1e6, "1000000"), (-2.5, "-2.5"),
        (12345678901, "12345678901"), (np.int64(7), "7"), (np.float32(0.5), "0.5"),
        (Decimal("5.00"), "5"), (Decimal("-0.50"), "-0.5"), (Decimal("1E+3"), "1000"),
        (Decimal("12345678901234567890.125"), "12345678901234567890.125"), (Decimal(100), "100"),
        ("5 pens\nand 2 more", "5 pens and 2 more"),
    ],
)  # fmt: skip
def test_answers_keep_every_digit_and_one_line(answer, expected):
    row = {"problem": "a", "reasoning": ["s"], "answer": answer}
    assert [e.answer for e in read_reasoning([row])] == [expected]
    row = {"question": "a", "answer": f"s\n#### {answer}"}
    if isinstance(answer, str):
        assert [e.answer for e in read_reasoning([row])] == [expected]


@pytest.mark.parametrize("answer", [True, float("nan"), float("inf"), None, [5]])
def test_answers_that_are_no_answer(answer):
    with pytest.raises(DataError, match="^row 1: .*answer"):
        list(read_reasoning([{"problem": "a", "reasoning": ["s"], "answer": answer}]))


def test_parquet_and_arrays(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"problem": TOM.problem, "reasoning": list(TOM.steps), "answer": "5"}] * 2
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert list(read_reasoning(tmp_path / "t.parquet")) == [TOM, TOM]
    row = rows[0] | {"reasoning": np.array(TOM.steps, dtype=object)}
    assert list(read_reasoning([row])) == [TOM]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problme": "a", "answer": "b"}, "did you mean 'problem'"),
        ({"problem": "a", "answer": "b"}, "reasoning"),
        ({"problem": "a", "reasoning": ["s"]}, "answer"),
        ({"problem": " ", "reasoning": ["s"], "answer": "b"}, "there is no text in 'problem'"),
        ({"problem": "a", "reasoning": [], "answer": "b"}, "there is no step in 'reasoning'"),
        (
            {"problem": "a", "reasoning": ["s", ""], "answer": "b"},
            "no text in 'step 2 of",
        ),
        (
            {"problem": "a", "reasoning": 3, "answer": "b"},
            "'reasoning' to be a list",
        ),
        ({"problem": "a", "reasoning": ["s"], "answer": ""}, "there is no text in 'answer'"),
        ({"problem": 3, "reasoning": ["s"], "answer": "b"}, "'problem' to be text, found 3"),
        ({"question": "a", "answer": "so 5"}, "no '####' before the answer in 'answer'"),
        ({"question": "a", "answer": "s\n####"}, "there is no text in 'answer'"),
        ({"question": "a", "answer": "#### 5"}, "there is no step in 'reasoning'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
        ({"messages": "a"}, "'messages' to be a list of messages"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "s\n1"},
                    {"role": "user", "content": "a"},
                ]
            },
            "the user right before the last one of the assistant, found none",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "tool", "content": "a"},
                    {"role": "assistant", "content": "s\n1"},
                ]
            },
            "the user right before the last one of the assistant, found 'tool'",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "s\n---"},
                ]
            },
            "to end in an answer, found '---'",
        ),
        ({"problem": "a\ud800", "reasoning": ["s"], "answer": "b"}, "surrogate"),
    ],
)
def test_rows_that_are_refused_are_named(tmp_path, row, message):
    good = {"problem": "a", "reasoning": ["s"], "answer": "b"}
    file = put(tmp_path / "t.jsonl", good, row)
    with pytest.raises(DataError, match=rf"t\.jsonl:2: .*{message}"):
        read_reasoning(file)


def test_no_rows(tmp_path):
    (tmp_path / "t.jsonl").write_text("")
    with pytest.raises(DataError, match="there is no row in it"):
        read_reasoning(tmp_path / "t.jsonl")


def test_rows_without_reasoning_where_none_is_needed():
    rows = [{"problem": "a", "answer": "1"}, {"question": "b", "answer": "#### 2"}]
    found = read_reasoning(rows, need_steps=False)
    assert [(e.problem, e.steps, e.answer) for e in found] == [("a", (), "1"), ("b", (), "2")]


def test_examples_are_a_data_set():
    examples = [ReasoningExample(f"p{i % 3}", (f"s{i}",), str(i)) for i in range(9)]
    data = ReasoningExamples.of(examples)
    assert (len(data), data[4], list(data)) == (9, examples[4], examples)
    assert list(data.take([8, 0])) == [examples[8], examples[0]]
    assert data.take([8]).where == ["row 9"]
    assert "p0\ns0\n0" in list(data.corpus)
    other = ReasoningExamples.of([*examples[:8], ReasoningExample("p2", ("s8",), "9")])
    assert list(data.texts) == list(other.texts)
    assert list(data.parts()) != list(other.parts())


def test_equal_problems_stay_on_one_side():
    data = ReasoningExamples.of(
        [ReasoningExample(f"p{i % 5}", (f"s{i}",), str(i)) for i in range(20)]
    )
    training, validation = split(data, 0.3, seed=0)
    assert not {e.problem for e in training} & {e.problem for e in validation}
    assert len(training) + len(validation) == 20
    assert sorted(map(str, [*training, *validation])) == sorted(map(str, data))
