"""Rows, texts, labels and splits: what is read, and what is said about what cannot be."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loopos.data.readers import (
    LabelledTexts,
    Texts,
    iter_rows,
    read_labelled,
    read_rows,
    read_texts,
    split,
)
from loopos.data.store import TextStore
from loopos.errors import ConfigError, DataError, MissingFileError


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Write a file in an empty working directory, so that messages hold its bare name."""
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return name

    return write


def rows_of(source):
    return [(row.where, dict(row.fields)) for row in read_rows(source)]


def message_of(function, *args, **kwargs):
    with pytest.raises(DataError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- JSONL -----------------------------------------------------------------------------------------


def test_jsonl_counts_blank_lines(put):
    path = put("t.jsonl", '\n{"text": "a", "label": 0}\n  \n\n{"text": "b", "label": 1}')
    assert rows_of(path) == [
        ("t.jsonl:2", {"text": "a", "label": 0}),
        ("t.jsonl:5", {"text": "b", "label": 1}),
    ]


def test_jsonl_may_have_windows_line_ends_and_a_byte_order_mark(put):
    path = put("t.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert rows_of(path) == [("t.jsonl:1", {"text": "a"}), ("t.jsonl:3", {"text": "b"})]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line_of_jsonl(put, separator):
    text = f"one{separator}two"
    line = json.dumps({"text": text}, ensure_ascii=False)
    path = put("t.ndjson", f"{line}\n{line}\n")
    assert rows_of(path) == [("t.ndjson:1", {"text": text}), ("t.ndjson:2", {"text": text})]


CUT = " (is the line cut short?)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "a", "lab',
            "not valid JSON: Unterminated string at column 15 (is the line cut short?)",
        ),
        (
            '{"text": "a",',
            "not valid JSON: Expecting property name enclosed in double quotes at column 14" + CUT,
        ),
        (
            '{"text": "a"',
            "not valid JSON: Expecting ',' delimiter at column 13 (is the line cut short?)",
        ),
        (
            "{'text': 1}",
            "not valid JSON: Expecting property name enclosed in double quotes at column 2",
        ),
        ('{"text": "a"} x', "not valid JSON: Extra data at column 15"),
        ('["a", 1]', "expected a JSON object, found list"),
        ("null", "expected a JSON object, found NoneType"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ('{"label": ' + "1" * 5000 + "}", "not valid JSON: a number is too long"),
    ],
)
def test_a_damaged_line_of_jsonl_is_named(put, line, message):
    path = put("t.jsonl", '{"text": "a"}\n\n' + line + "\n")
    assert message_of(read_rows, path) == f"t.jsonl:3: {message}"


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.tsv", "t.txt"])
def test_a_wrong_encoding_is_named_with_its_line(put, name):
    lines = b'{"text": "a"}\n\n' if name == "t.jsonl" else b"text\ntwo\n"
    path = put(name, lines + b"r\xe9sum\xe9\n")
    assert message_of(read_texts, path) == f"{name}:3: not UTF-8 text (byte 0xe9)"


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_wrong_encoding_far_down_is_named_with_its_line(put, name):
    row = '{"text": "é"}' if name == "t.jsonl" else "é"
    lines = (f"text\n{row}\n" if name == "t.csv" else f"{row}\n{row}\n") + f"{row}\n" * 9_997
    path = put(name, lines.encode() + b'{"text": "\xff"}\n')
    assert message_of(read_texts, path) == f"{name}:10000: not UTF-8 text (byte 0xff)"


@pytest.mark.parametrize(
    ("text", "key"),
    [('{"text": "a", "text": "b"}', "text"), ('{"a": {"b": 1, "c": 2, "b": 1}}', "b")],
)
def test_a_key_that_stands_twice_is_refused(put, text, key):
    expected = f"the key '{key}' stands twice in this object"
    path = put("t.jsonl", '{"text": "a"}\n' + text)
    assert message_of(read_rows, path) == f"t.jsonl:2: {expected}"
    assert message_of(read_rows, put("t.json", f'[{{"text": 1}},\n{text}]')) == (
        f"t.json:2: {expected}"
    )


def test_a_table_may_end_its_lines_with_carriage_returns(put):
    path = put("t.csv", b'text,label\ra,0\r"b\rc",1\r')
    assert [row.fields for row in read_rows(path)] == [
        {"text": "a", "label": "0"}, {"text": "b\rc", "label": "1"},
    ]  # fmt: skip


def test_rows_come_one_by_one_and_tables_may_be_read_side_by_side(put):
    first = put("a.csv", "text\n" + "".join(f"a{i}\n" for i in range(3)) + '"open\n')
    second = put("b.csv", "text\n" + "".join(f"b{i}\n" for i in range(3)))
    pairs = zip(iter_rows(first), iter_rows(second), strict=True)
    # What is wrong further down is said there, and no lock is held in between.
    for i in range(3):
        assert [row.fields["text"] for row in next(pairs)] == [f"a{i}", f"b{i}"]
    with pytest.raises(DataError, match=r"^a\.csv:5: not a valid table"):
        next(pairs)


# -- JSON arrays -----------------------------------------------------------------------------------


def test_objects_of_an_array_have_the_line_they_begin_on(put):
    text = '\n[\n  {"text": "a",\n   "label": 0},\n\n  {"text": "b"}, {"text": "c"}\n]\n'
    assert rows_of(put("t.json", text)) == [
        ("t.json:3", {"text": "a", "label": 0}),
        ("t.json:6", {"text": "b"}),
        ("t.json:6", {"text": "c"}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.json:1: expected a JSON array of objects"),
        ('{"text": "a"}', "t.json:1: expected a JSON array of objects"),
        ("[]", "t.json: there is no row in it"),
        ("[", "t.json:1: not valid JSON: Expecting value (is the file cut short?)"),
        (
            '[{"a": 1},\n{"a": \n',
            "t.json:3: not valid JSON: Expecting value (is the file cut short?)",
        ),
        (
            '[{"a": 1},\n{"a": "x',
            "t.json:2: not valid JSON: Unterminated string (is the file cut short?)",
        ),
        ('[{"a": 1}', "t.json:1: expected ',' or ']' after this object (is the file cut short?)"),
        ('[{"a": 1}\n{"a": 2}]', "t.json:1: expected ',' or ']' after this object"),
        ('[{"a": 1},\n]', "t.json:2: not valid JSON: Expecting value"),
        ('[{"a": 1},\n3]', "t.json:2: expected a JSON object, found int"),
        ('[{"a": 1}]\n\n[]', "t.json:3: there is text after the array"),
        ('[{"a": ' + "1" * 5000 + "}]", "t.json:1: not valid JSON: a number is too long"),
        ("[" * 100_000, "t.json:1: not valid JSON: nested too deeply"),
    ],
)
def test_a_damaged_array_is_named(put, text, message):
    assert message_of(read_rows, put("t.json", text)) == message


# -- tables ----------------------------------------------------------------------------------------


def test_records_of_a_table_have_the_line_they_begin_on(put):
    text = 'text,label\n"a\nb, ""quoted""",0\n\nc,1\n"d\n\ne",0\n'
    assert rows_of(put("t.csv", text)) == [
        ("t.csv:2", {"text": 'a\nb, "quoted"', "label": "0"}),
        ("t.csv:5", {"text": "c", "label": "1"}),
        ("t.csv:6", {"text": "d\n\ne", "label": "0"}),
    ]


def test_windows_line_ends_and_a_byte_order_mark_are_no_part_of_a_table(put):
    path = put("t.csv", b'\xef\xbb\xbftext,label\r\n"a\r\nb",0\r\nc,1\r\n')
    assert rows_of(path) == [
        ("t.csv:2", {"text": "a\r\nb", "label": "0"}),
        ("t.csv:4", {"text": "c", "label": "1"}),
    ]


def test_a_tsv_has_tabs(put):
    path = put("t.tsv", "text\tlabel\na, b\t0\n")
    assert rows_of(path) == [("t.tsv:2", {"text": "a, b", "label": "0"})]


def test_the_limit_of_csv_is_left_as_it_was(put):
    before = csv.field_size_limit()
    read_rows(put("t.csv", "text\n" + "x" * (before + 10) + "\n"))
    with pytest.raises(DataError):
        read_rows(put("u.csv", "text\na,b\n"))
    assert csv.field_size_limit() == before


def test_a_known_name_may_look_like_a_number():
    names = ["01", "x"]
    assert read_labelled([{"text": "a", "label": "01"}], label_names=names).labels.tolist() == [0]


def test_fields_of_a_table_may_be_huge(put):
    text = "wort " * 400_000
    path = put("t.csv", f"text,label\n{text},0\n")
    [row] = read_rows(path)
    assert row.fields == {"text": text, "label": "0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv: there is no row in it"),
        ("\n\n", "t.csv: there is no row in it"),
        ("text,label\n", "t.csv: there is no row in it"),
        ("text,text\na,b\n", "t.csv:1: two columns are named 'text' in the header"),
        ("\ntext,,label\na,b,c\n", "t.csv:2: column 2 has no name in the header"),
        ('text,label\n"a\nb",0\nc\n', "t.csv:4: expected 2 fields, found 1"),
        ("text,label\na,b,0\n", "t.csv:2: expected 2 fields, found 3"),
        ('text,label\na,0\n"b,1\nc,0\n', "t.csv:3: not a valid table (unexpected end of data)"),
        ('text,label\na,0\n"b" x,1\n', "t.csv:3: not a valid table (',' expected after '\"')"),
    ],
)
def test_a_damaged_table_is_named(put, text, message):
    assert message_of(read_rows, put("t.csv", text)) == message


def test_a_table_without_a_header_is_missing_the_field(put):
    path = put("t.csv", "fine film,1\nbad film,0\n")
    expected = "t.csv:2: no field 'text' (found: fine film, 1)"
    assert message_of(read_labelled, path) == expected


# -- other sources ---------------------------------------------------------------------------------


def test_mappings_from_lists_and_generators_are_numbered():
    rows = [{"text": "a"}, {"text": "b"}]
    expected = [("row 1", {"text": "a"}), ("row 2", {"text": "b"})]
    assert rows_of(rows) == expected
    assert rows_of(row for row in rows) == expected
    assert rows_of(tuple(rows)) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the data: there is no row in it"),
        ([{"text": "a"}, "b"], "row 2: expected a mapping, found str"),
        ([{"text": "a"}, ("b", 1)], "row 2: expected a mapping, found tuple"),
        ({"text": "a"}, "expected a path or a list of mappings, found dict"),
        (b"t.jsonl", "expected a path or a list of mappings, found bytes"),
        (None, "expected a path or a list of mappings, found NoneType"),
    ],
)
def test_what_is_no_source_is_said(source, message):
    assert message_of(read_rows, source) == message


def test_a_missing_file_is_named_with_its_neighbour(put, tmp_path):
    put("train.jsonl", "")
    with pytest.raises(MissingFileError) as caught:
        read_rows("trian.jsonl")
    assert str(caught.value) == "trian.jsonl: no such file; did you mean 'train.jsonl'?"
    assert isinstance(caught.value, FileNotFoundError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(MissingFileError) as caught:
        read_texts(tmp_path / "other" / "zzz.txt")
    assert str(caught.value) == f"{tmp_path / 'other' / 'zzz.txt'}: no such file"


def test_what_is_no_file_of_rows_is_said(put, tmp_path):
    (tmp_path / "data.csv").mkdir()
    assert message_of(read_rows, "data.csv") == "data.csv: is a directory, expected a file"
    expected = (
        "expected a file of rows ending in .jsonl, .json, .csv, .tsv, .parquet or .arrow, found "
    )
    assert message_of(read_rows, put("t.xls", "")) == f"t.xls: {expected}'.xls'"
    assert message_of(read_rows, put("rows", "")) == f"rows: {expected}'no ending'"
    # A text where a path belongs.
    assert message_of(read_rows, "a" * 5000).endswith(": cannot be read (File name too long)")


def test_endings_may_be_in_capitals(put):
    assert rows_of(put("T.JSONL", '{"a": 1}')) == [("T.JSONL:1", {"a": 1})]


# -- texts -----------------------------------------------------------------------------------------


def test_a_missing_field_is_named_with_its_neighbour(put):
    path = put("t.jsonl", '{"text": "a"}\n{"txet": "a", "label": 1}\n')
    expected = "t.jsonl:2: no field 'text'; did you mean 'txet'? (found: txet, label)"
    assert message_of(read_texts, path) == expected
    assert message_of(read_texts, [{}]) == "row 1: no field 'text' (found: nothing)"
    many = [{f"column {i}": 0 for i in range(100)}]
    assert message_of(read_texts, many).endswith("column 8, column 9, ...)")


@pytest.mark.parametrize("value", [None, 3, 2.5, float("nan"), True, ["a"], b"a"])
def test_a_text_must_be_text(value):
    found = message_of(read_texts, [{"text": "a"}, {"text": value}])
    assert found == f"row 2: expected 'text' to be text, found {value!r}"


def test_long_values_are_not_repeated_whole():
    assert len(message_of(read_texts, [{"text": list(range(10_000))}])) < 100


def test_half_a_surrogate_pair_is_no_text(put):
    path = put("t.jsonl", '{"text": "a", "label": "\\ud83d"}\n{"text": "\\ud83c\\udf89"}\n')
    expected = "t.jsonl:1: 'label' has half a surrogate pair, so no text"
    assert message_of(read_labelled, path) == expected
    assert read_texts(path).texts == ["a", "🎉"]
    expected = "row 1: 'text' has half a surrogate pair, so no text"
    assert message_of(read_texts, [{"text": "\udc80"}]) == expected


TEXTS = [
    "今天天气很好,我们去公园吧。",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇪",
    "שלום עולם \u200f مرحبا بالعالم",
    "z\u0308\u0323 zalgo \u2028 line",
    "word " * 10_000,
]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.tsv"])
def test_texts_of_every_script_and_length_are_read_as_they_are(tmp_path, name):
    path = tmp_path / name
    rows = [{"text": text, "label": "ja" if i % 2 else "不"} for i, text in enumerate(TEXTS)]
    with path.open("w", encoding="utf-8", newline="") as file:
        if name.endswith("json"):
            json.dump(rows, file)
        elif name.endswith("jsonl"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            delimiter = "," if name.endswith("csv") else "\t"
            writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    data = read_labelled(path)
    assert data.texts == TEXTS
    assert data.label_names == ["ja", "不"]
    assert data.labels.tolist() == [1, 0, 1, 0, 1]


@given(st.lists(st.fixed_dictionaries({"text": st.text(), "label": st.integers()}), min_size=1))
def test_jsonl_and_tables_give_back_what_was_written(tmp_path_factory, rows):
    directory = tmp_path_factory.mktemp("rows")
    lines = directory / "t.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert [row.fields for row in read_rows(lines)] == rows
    array = directory / "t.json"
    array.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8", newline="")
    assert [row.fields for row in read_rows(array)] == rows
    table = directory / "t.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([["text", "label"], *([row["text"], row["label"]] for row in rows)])
    expected = [{"text": row["text"], "label": str(row["label"])} for row in rows]
    assert [row.fields for row in read_rows(table)] == expected


def test_a_plain_file_is_divided_by_form_feeds(put):
    path = put("t.txt", "one\ntwo\n\fthree\n\f \n\ffour")
    data = read_texts(path)
    assert data.texts == ["one\ntwo\n", "three\n", "four"]
    assert data.where == ["t.txt:1", "t.txt:3", "t.txt:5"]
    assert data.dropped == ["t.txt:4"]
    assert message_of(read_texts, put("e.txt", " \n\f\n")) == "e.txt: there is no text in it"


def test_empty_texts_are_dropped_and_reported():
    rows = [{"body": "a"}, {"body": " \n\t\u3000"}, {"body": ""}, {"body": "b"}]
    data = read_texts(rows, "body")
    assert data == Texts(["a", "b"], ["row 1", "row 4"], dropped=["row 2", "row 3"])
    assert data.take([1]) == Texts(["b"], ["row 4"], dropped=["row 2", "row 3"])
    assert message_of(read_texts, rows[1:3], "body") == "the data: there is no text in it"


# -- labels ----------------------------------------------------------------------------------------


def labelled(*labels, **options):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    return read_labelled(rows, **options)


def test_integer_labels_are_classes():
    data = labelled(0, 2, 1, 2)
    assert data.labels.tolist() == [0, 2, 1, 2]
    assert data.labels.dtype == np.int64
    assert data.label_names == ["0", "1", "2"]
    assert data.where == ["row 1", "row 2", "row 3", "row 4"]
    assert labelled(np.int64(3), np.uint8(0)).labels.tolist() == [3, 0]
    assert labelled(0, 1, num_classes=4).label_names == ["0", "1", "2", "3"]


def test_names_become_classes_in_sorted_order():
    data = labelled("pos", " neg ", "ärger", "pos")
    assert data.label_names == ["neg", "pos", "ärger"]
    assert data.labels.tolist() == [1, 0, 2, 1]
    assert data.take([2, 0]).labels.tolist() == [2, 1]
    assert data.take([2, 0]).label_names == data.label_names


def test_integers_of_a_table_are_classes(put):
    data = read_labelled(put("t.csv", "text,label\na,1\nb, 0 \nc,01\n"))
    assert (data.labels.tolist(), data.label_names) == ([1, 0, 1], ["0", "1"])
    data = read_labelled(put("t.csv", "text,label\na,1\nb,none\n"))
    assert (data.labels.tolist(), data.label_names) == ([0, 1], ["1", "none"])
    # What only looks like an integer is a name.
    for name in ("--5", "²", "٣", "1.0", "9" * 30, "9" * 5000):
        assert labelled("0", name).label_names == sorted(["0", name])


@pytest.mark.parametrize("value", [True, 1.0, float("nan"), None, np.float32(1), np.bool_(1)])
def test_a_label_is_an_integer_or_a_name(value):
    expected = f"row 2: expected 'label' to be an integer or text, found {value!r}"
    assert message_of(labelled, 0, value) == expected


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            [0, 1, "1"],
            {},
            "row 3: 'label' is '1' here and 0 in row 1: expected all integers or all names",
        ),
        (
            ["a", 1],
            {},
            "row 2: 'label' is 1 here and 'a' in row 1: expected all integers or all names",
        ),
        (["a", " "], {}, "row 2: 'label' is empty"),
        ([0, -1], {}, "row 2: expected 'label' from 0 or more, found -1"),
        (["0", "-1"], {}, "row 2: expected 'label' from 0 or more, found -1"),
        ([0, 1, 2], {"num_classes": 2}, "row 3: expected 'label' from 0 to 1, found 2"),
        ([0, -1], {"num_classes": 2}, "row 2: expected 'label' from 0 to 1, found -1"),
        ([0, 10**9], {}, "row 2: expected 'label' from 0 to 99999, found 1000000000"),
        ([0, 10**30], {}, f"row 2: expected 'label' from 0 to 99999, found {10**30}"),
        ([1, 1], {}, "row 1: every row has the 'label' 1, expected two classes at least"),
        (["a"], {}, "row 1: every row has the 'label' 'a', expected two classes at least"),
        (
            ["a", "b", "c"],
            {"num_classes": 2},
            "'label' has 3 different names (a, b, c), more than num_classes 2",
        ),
        (
            ["neg", "pso"],
            {"label_names": ["neg", "pos"]},
            "row 2: unknown 'label' 'pso'; did you mean 'pos'? (known: neg, pos)",
        ),
        ([0, 2], {"label_names": ["0", "1"]}, "row 2: unknown 'label' 2 (known: 0, 1)"),
        ([0, 2], {"label_names": ["neg", "pos"]}, "row 2: unknown 'label' 2 (known: neg, pos)"),
        ([0, 1], {"label_names": ["1", "2"]}, "row 1: unknown 'label' 0 (known: 1, 2)"),
        (["a", "b"], {"label_names": ["a", "b", "a"]}, "the label name 'a' is given twice"),
    ],
)
def test_labels_outside_the_classes_are_named(labels, options, message):
    assert message_of(labelled, *labels, **options) == message


def test_known_classes_keep_their_numbers():
    known = ["pos", "neg", "none"]
    data = labelled("neg", "neg", label_names=known)
    assert (data.labels.tolist(), data.label_names) == ([1, 1], known)
    # Numbers of named classes, and names that are numbers.
    assert labelled(2, 0, label_names=known).labels.tolist() == [2, 0]
    assert labelled(2, 1, label_names=["1", "2"]).labels.tolist() == [1, 0]


def test_classes_are_renumbered_by_name():
    data = labelled("b", "c", "b")
    again = data.with_label_names(["c", "a", "b"])
    assert (again.labels.tolist(), again.label_names) == ([2, 0, 2], ["c", "a", "b"])
    assert again.texts == data.texts
    assert again.with_label_names(["c", "a", "b"]) is again
    expected = "row 2: unknown 'label' 'c' (known: a, b)"
    assert message_of(data.with_label_names, ["a", "b"]) == expected
    numbers = labelled(1, 0, 1)
    assert numbers.with_label_names(["neg", "pos"]).labels.tolist() == [1, 0, 1]
    assert numbers.with_label_names(["0", "1", "2"]).labels.tolist() == [1, 0, 1]


def test_fields_have_the_names_that_are_asked_for(put):
    path = put("t.csv", "id,review,stars,date\n7,fine,up,x\n8,,up,y\n9,bad,down,z\n")
    data = read_labelled(path, "review", "stars")
    assert data.texts == ["fine", "bad"]
    assert data.labels.tolist() == [1, 0]
    assert data.where == ["t.csv:2", "t.csv:4"]
    assert data.dropped == ["t.csv:3"]
    expected = "t.csv:2: no field 'star'; did you mean 'stars'? (found: id, review, stars, date)"
    assert message_of(read_labelled, path, "review", "star") == expected


def test_no_text_at_all_is_said():
    assert message_of(read_labelled, [{"text": " ", "label": 0}]) == (
        "row 1: no row has any text in 'text'"
    )


# -- numbers to predict ----------------------------------------------------------------------------


def test_numbers_to_predict(put):
    data = labelled(1, 2.5, "-3e-1", np.float32(0.5), np.int8(4), " 7. ", ".5", num_classes=1)
    assert data.problem == "regression"
    assert (data.labels.dtype, data.label_names) == (np.float64, [])
    assert data.labels.tolist() == [1, 2.5, -0.3, 0.5, 4, 7, 0.5]
    assert labelled(3, 3, problem="regression").labels.tolist() == [3, 3]
    data = read_labelled(put("t.csv", "text,label\na,0.25\n,x\nb,-2\n"), problem="regression")
    assert (data.labels.tolist(), data.where) == ([0.25, -2], ["t.csv:2", "t.csv:4"])
    assert data.take([1]).labels.tolist() == [-2]
    assert data.take([1]).problem == "regression"
    assert data.with_label_names([]) is data
    assert message_of(data.with_label_names, ["a"]) == (
        "numbers to predict have no label names, found ['a']"
    )


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(1), None, float("nan"), float("inf"), 10**400, "nan", "1,5", "1_0", "٣", "",
     "high", "1e999", [1.0], np.array([1.0])],
)  # fmt: skip
def test_what_is_no_finite_number_is_named(value):
    found = message_of(labelled, 0.5, value, problem="regression")
    assert found.startswith("row 2: expected 'label' to be a finite number, found ")


def test_a_regression_has_no_classes():
    expected = "'label' is a number to predict, but label names are given (a, b)"
    assert message_of(labelled, 1, label_names=["a", "b"], num_classes=1) == expected
    assert labelled(1, 2, label_names=[], num_classes=1).problem == "regression"
    expected = "a regression has one target, found num_classes 3"
    assert message_of(labelled, 1, problem="regression", num_classes=3) == expected
    with pytest.raises(ConfigError) as caught:
        labelled(1, 2, problem="regresion")
    assert str(caught.value) == (
        "problem: expected one of classification, regression, multi_label, found 'regresion'; "
        "did you mean 'regression'?"
    )


# -- several labels --------------------------------------------------------------------------------


def test_lists_are_several_labels():
    data = labelled(["b", " a "], [], ("c",), np.array(["a", "c"]))
    assert (data.problem, data.label_names) == ("multi_label", ["a", "b", "c"])
    assert data.labels.dtype == np.int8
    assert data.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 1]]
    assert data.take([3, 1]).labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert data.take([3, 1]).problem == "multi_label"
    data = labelled([2, 0], [np.int64(1)])
    assert (data.label_names, data.labels.tolist()[0]) == (["0", "1", "2"], [1, 0, 1])
    assert labelled([0], [1], num_classes=4).label_names == ["0", "1", "2", "3"]
    assert labelled(["1"], ["0"]).label_names == ["0", "1"]
    assert labelled(["x"], [], num_classes=1, problem="multi_label").labels.tolist() == [[1], [0]]


def test_cells_are_divided_only_where_several_labels_are_asked_for(put):
    path = put("t.csv", "text,label\na,x|y\nb,\nc, z \n")
    data = read_labelled(path, problem="multi_label")
    assert (data.label_names, data.labels.tolist()) == (
        ["x", "y", "z"], [[1, 1, 0], [0, 0, 0], [0, 0, 1]],
    )  # fmt: skip
    assert message_of(read_labelled, path) == "t.csv:3: 'label' is empty"
    data = labelled("x|y", "z", ["x"], problem="multi_label")
    assert data.labels.tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert labelled("x|y", "z").label_names == ["x|y", "z"]
    data = read_labelled(put("t.csv", "text,label\na,0|2\nb,1\n"), problem="multi_label")
    assert data.label_names == ["0", "1", "2"]


MIXED = "expected a list in every row or in none"


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([["a"], "b"], {}, f"row 2: 'label' is 'b' here and ['a'] in row 1: {MIXED}"),
        (["b", ["a"]], {}, f"row 2: 'label' is ['a'] here and 'b' in row 1: {MIXED}"),
        ([["a"], None], {}, f"row 2: 'label' is None here and ['a'] in row 1: {MIXED}"),
        (
            [["a"], ["b", 1]],
            {},
            "row 2: 'label' is 1 here and 'a' in row 1: expected all integers or all names",
        ),
        ([["a", "a"]], {}, "row 1: 'label' has 'a' twice"),
        ([["0"], ["1", "01"]], {}, "row 2: 'label' has '1' twice"),
        ([[], ["a", 0]], {"label_names": ["a", "b"]},
         "row 2: 'label' is 0 here and 'a' in row 2: expected all integers or all names"),
        ([["a"], [""]], {}, "row 2: 'label' is empty"),
        ([["a"], ["b", None]], {},
         "row 2: expected 'label' to be a list of integers or texts, found None"),
        ([[0], [True]], {},
         "row 2: expected 'label' to be a list of integers or texts, found True"),
        ([[0], [-1]], {}, "row 2: expected 'label' from 0 or more, found -1"),
        ([[0], [1, 2]], {"num_classes": 2}, "row 2: expected 'label' from 0 to 1, found 2"),
        ([["a"], ["b", "c"]], {"num_classes": 2},
         "'label' has 3 different names (a, b, c), more than num_classes 2"),
        ([["neg"], ["pso"]], {"label_names": ["neg", "pos"]},
         "row 2: unknown 'label' 'pso'; did you mean 'pos'? (known: neg, pos)"),
        ([[], []], {}, "row 1: no row has any label in 'label'"),
        ([["a"], 3], {"problem": "multi_label"},
         "row 2: expected 'label' to be a list of labels, found 3"),
        (["a||b"], {"problem": "multi_label"}, "row 1: 'label' is empty"),
        (["a", ["b"]], {"problem": "classification"},
         "row 2: expected 'label' to be an integer or text, found ['b']"),
    ],
)  # fmt: skip
def test_labels_that_are_no_set_of_labels_are_named(labels, options, message):
    assert message_of(labelled, *labels, **options) == message


def test_several_labels_are_renumbered_by_name():
    data = labelled(["b"], ["c", "b"], [])
    again = data.with_label_names(["c", "a", "b"])
    assert again.labels.tolist() == [[0, 0, 1], [1, 0, 1], [0, 0, 0]]
    assert (again.labels.dtype, again.problem) == (np.int8, "multi_label")
    assert data.with_label_names(["b", "c"]) is data
    expected = "row 2: unknown 'label' 'c' (known: a, b)"
    assert message_of(data.with_label_names, ["a", "b"]) == expected
    known = labelled(["pos"], [], label_names=["pos", "neg"])
    assert known.labels.tolist() == [[1, 0], [0, 0]]
    assert labelled([1], [], label_names=["pos", "neg"]).labels.tolist() == [[0, 1], [0, 0]]
    assert labelled([], [], label_names=["pos", "neg"]).labels.shape == (2, 2)


@given(st.lists(st.lists(st.sampled_from("abcdef"), unique=True, max_size=4), min_size=1))
def test_several_labels_are_what_was_given(sets):
    if not any(sets):
        return
    data = labelled(*sets)
    found = [{n for n, one in zip(data.label_names, row, strict=True) if one}
             for row in data.labels.tolist()]  # fmt: skip
    assert found == [set(labels) for labels in sets]
    assert data.label_names == sorted(set().union(*sets))


# -- splitting -------------------------------------------------------------------------------------


def data_of(texts, labels):
    names = [str(i) for i in range(max(labels) + 1)]
    where = [f"row {i + 1}" for i in range(len(texts))]
    return LabelledTexts(texts, where, np.array(labels, np.int64), names, dropped=["row 0"])


def rows(data):
    return list(zip(data.texts, data.where, data.labels.tolist(), strict=True))


def test_a_split_is_seeded():
    data = data_of([f"t{i}" for i in range(100)], [i % 3 for i in range(100)])
    training, validation = split(data, 0.2, seed=0)
    again = split(data, 0.2, seed=0)
    assert (rows(training), rows(validation)) == (rows(again[0]), rows(again[1]))
    assert rows(split(data, 0.2, seed=1)[1]) != rows(validation)
    assert sorted(rows(training) + rows(validation)) == sorted(rows(data))
    assert np.bincount(validation.labels).tolist() == [7, 7, 7]
    # In order, and what was dropped is told once.
    for part in (training, validation):
        assert [int(text[1:]) for text in part.texts] == sorted(int(t[1:]) for t in part.texts)
    assert (training.dropped, validation.dropped) == (["row 0"], [])
    assert training.label_names == validation.label_names == ["0", "1", "2"]


def test_texts_without_labels_are_split_too():
    data = Texts([f"t{i % 10}" for i in range(20)], [f"row {i}" for i in range(20)])
    training, validation = split(data, 0.3, seed=0)
    assert type(training) is type(validation) is Texts
    assert (len(training.texts), len(validation.texts)) == (14, 6)
    assert not set(training.texts) & set(validation.texts)


def test_a_much_repeated_text_does_not_overfill_the_validation():
    data = data_of(["same"] * 80 + [f"t{i}" for i in range(20)], [0] * 100)
    for seed in range(20):
        assert len(split(data, 0.1, seed)[1].texts) == 10


@given(
    st.lists(st.tuples(st.integers(0, 25), st.integers(0, 3)), min_size=2, max_size=80),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
@example([(0, 0), (0, 0), (0, 1), (1, 1)], 0.5, 0)
def test_no_text_is_on_both_sides_and_every_class_is(rows_drawn, fraction, seed):
    # A class of its own for each text, so that classes and texts do not interleave.
    texts = [f"{label}-{number}" for number, label in rows_drawn]
    labels = [label for _, label in rows_drawn]
    data = data_of(texts, labels)
    different = {label: {t for t, k in zip(texts, labels, strict=True) if k == label}
                 for label in set(labels)}  # fmt: skip
    if all(len(found) < 2 for found in different.values()):
        assert message_of(split, data, fraction, seed) == (
            f"{len(texts)} {'row is' if len(texts) == 1 else 'rows are'} too few to split off a "
            f"validation fraction of {fraction}"
        )
        return
    training, validation = split(data, fraction, seed)
    assert sorted(rows(training) + rows(validation)) == sorted(rows(data))
    assert not set(training.texts) & set(validation.texts)
    largest = Counter(texts)
    for label, found in different.items():
        held, total = (validation.labels == label).sum(), (data.labels == label).sum()
        if len(found) < 2:
            assert held == 0
            continue
        assert 0 < held < total
        group = max(largest[text] for text in found)
        assert abs(held - fraction * total) <= max(group, 1) + 0.5


@given(st.integers(20, 300), st.floats(0.05, 0.5), st.integers(0, 3))
def test_the_fraction_is_honoured_within_a_row(count, fraction, seed):
    data = data_of([f"t{i}" for i in range(count)], [0] * count)
    held = len(split(data, fraction, seed)[1].texts)
    assert abs(held - fraction * count) <= 0.5 + 1e-9


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_is_between_0_and_1(fraction):
    expected = f"expected a validation fraction between 0 and 1, found {fraction}"
    assert message_of(split, data_of(["a", "b"], [0, 1]), fraction, 0) == expected


def test_one_row_of_each_class_cannot_be_split():
    expected = "2 rows are too few to split off a validation fraction of 0.5"
    assert message_of(split, data_of(["a", "b"], [0, 1]), 0.5, 0) == expected


@pytest.mark.parametrize("labels", [[0.5, 1.5] * 30, [["a"], []] * 30])
def test_only_classes_are_split_by_label(labels):
    problem = "regression" if isinstance(labels[0], float) else None
    data = labelled(*labels, problem=problem)
    training, validation = split(data, 0.25, seed=3)
    assert (len(training.texts), len(validation.texts)) == (45, 15)
    plain = split(Texts(data.texts, data.where), 0.25, seed=3)
    assert validation.texts == plain[1].texts
    assert training.problem == validation.problem == data.problem
    at = [int(place.removeprefix("row ")) - 1 for place in validation.where]
    assert validation.labels.tolist() == data.labels[at].tolist()


# -- a single text ---------------------------------------------------------------------------------


@given(
    st.lists(st.text(alphabet="ab \n\r猫é🐈", max_size=30), min_size=1, max_size=12),
    st.floats(0.01, 0.99),
    st.sampled_from([None, 0]),
)
@example(["line\n"] * 20, 0.1, 0)
def test_of_a_single_text_the_last_part_is_held_out(parts, fraction, memory_limit):
    text = "".join(parts)
    stored = TextStore.of([text], memory_limit)
    if stored.without_ends(fraction) is None:
        assert message_of(split, Texts(stored, ["t.txt:1"]), fraction, 0) == (
            f"the text is too short to hold out a validation fraction of {fraction}"
        )
        return
    training, validation = split(Texts(stored, ["t.txt:1"]), fraction, seed=0)
    [head], [tail] = training.texts, validation.texts
    assert head + tail == text
    assert head.strip()
    assert tail.strip()
    size, held = len(text.encode()), len(tail.encode())
    # A character has up to four bytes.
    assert abs(held - fraction * size) <= min(fraction, 1 - fraction) * size / 2 + 4
    assert (training.where, validation.where) == (["t.txt:1"], ["t.txt:1"])
    # The same of a list, and again.
    for other in (Texts([text], ["t.txt:1"]), Texts(stored, ["t.txt:1"])):
        assert [part.texts for part in split(other, fraction, seed=5)] == [[head], [tail]]


def test_the_cut_is_at_the_nearest_end_of_a_line():
    text = "".join(f"line {i:02}\n" for i in range(50))
    for fraction, lines in ((0.1, 5), (0.11, 6), (0.107, 5), (0.5, 25), (0.9, 45)):
        validation = split(Texts([text], ["row 1"]), fraction, seed=0)[1]
        assert validation.texts == [text[-8 * lines :]]
    # None is near: the cut is between two characters.
    training, validation = split(Texts(["title\n" + "猫" * 998], ["row 1"]), 0.25, seed=0)
    assert validation.texts == ["猫" * 250]
    assert training.held_out == ""
    assert validation.held_out == "the end of the only text, 750 of 3,000 bytes (25.0%)"


def test_equal_texts_are_one_text():
    data = Texts(["same same"] * 3, ["a:1", "a:2", "a:3"], dropped=["a:4"])
    training, validation = split(data.take([0, 2]), 0.5, seed=0)
    assert (training.texts, validation.texts) == (["same"] * 2, [" same"] * 2)
    assert (training.where, validation.where) == (["a:1", "a:3"],) * 2
    assert validation.held_out == "the ends of 2 equal texts, 10 of 18 bytes (55.6%)"
    assert (training.dropped, validation.dropped) == (["a:4"], [])


def test_only_plain_texts_are_cut():
    text = "a long review, with many words\n" * 9
    assert message_of(split, data_of([text], [0]), 0.1, 0) == (
        "1 row is too few to split off a validation fraction of 0.1"
    )
