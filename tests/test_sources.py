"""Where rows come from: patterns, several files, Parquet and Arrow, data frames and datasets."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from loopos.config import load_config
from loopos.data.conversations import read_conversations
from loopos.data.readers import iter_rows, read_labelled, read_rows, read_texts
from loopos.data.reasoning import read_reasoning
from loopos.errors import ConfigError, DataError, MissingFileError
from loopos.runner import prepare

ROWS = [{"text": f"text {i} é", "label": i % 2} for i in range(5)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put_jsonl(name, rows):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def rows_of(source):
    return [(row.where, dict(row.fields)) for row in read_rows(source)]


def message_of(function, *args, kind=DataError, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- several files -----------------------------------------------------------------------------


def test_a_pattern_names_its_files_in_sorted_order():
    put_jsonl("data/b.jsonl", ROWS[2:])
    put_jsonl("data/a.jsonl", ROWS[:2])
    put_jsonl("data/in/c.jsonl", ROWS[:1])
    Path("data/note.md").write_text("no rows")
    expected = [("data/a.jsonl:1", ROWS[0]), ("data/a.jsonl:2", ROWS[1])]
    expected += [(f"data/b.jsonl:{i + 1}", row) for i, row in enumerate(ROWS[2:])]
    assert rows_of("data/*.jsonl") == rows_of(Path("data/*.jsonl")) == expected
    assert rows_of("data/[ab].jsonl") == expected
    assert rows_of("data/?.jsonl") == expected
    assert len(rows_of("data/**/*.jsonl")) == 6
    data = read_labelled("data/*.jsonl")
    assert data.where == [place for place, _ in expected]
    assert data.labels.tolist() == [0, 1, 0, 1, 0]


def test_a_file_may_have_a_name_that_looks_like_a_pattern():
    put_jsonl("a[1].jsonl", ROWS[:1])
    put_jsonl("a1.jsonl", ROWS[1:])
    assert rows_of("a[1].jsonl") == [("a[1].jsonl:1", ROWS[0])]


def test_a_pattern_without_a_file_is_said():
    put_jsonl("a.jsonl", ROWS)
    expected = "data/*.jsonl: no file matches"
    assert message_of(read_rows, "data/*.jsonl", kind=MissingFileError) == expected
    Path("dir.jsonl").mkdir()
    expected = "d*.jsonl: no file matches"
    assert message_of(read_rows, ["a.jsonl", "d*.jsonl"], kind=MissingFileError) == expected
    long = "a?" * 5000
    assert message_of(read_rows, long, kind=MissingFileError).endswith("': no file matches")


def test_several_files_are_read_in_the_order_given():
    put_jsonl("b.jsonl", ROWS[:1])
    put_jsonl("a1.jsonl", ROWS[1:2])
    put_jsonl("a2.jsonl", [])
    Path("t.csv").write_text("text,label\nlast,1\n")
    sources = ["b.jsonl", Path("a*.jsonl"), "t.csv"]
    for given in (sources, tuple(sources), iter(sources)):
        assert [place for place, _ in rows_of(given)] == ["b.jsonl:1", "a1.jsonl:1", "t.csv:2"]
    # In a table numbers are text.
    assert message_of(read_labelled, sources) == (
        "t.csv:2: 'label' is '1' here and 0 in b.jsonl:1: expected all integers or all names"
    )
    assert read_texts(sources).where == ["b.jsonl:1", "a1.jsonl:1", "t.csv:2"]


def test_what_is_wrong_with_several_files_is_said_before_one_is_read():
    put_jsonl("a.jsonl", ROWS)
    rows = iter_rows(["a.jsonl", "b.jsonl"])
    assert message_of(next, rows, kind=MissingFileError) == (
        "b.jsonl: no such file; did you mean 'a.jsonl'?"
    )
    assert message_of(read_rows, ["a.jsonl", {"text": "a"}]) == (
        "source 2: expected a path, found dict"
    )
    put_jsonl("e.jsonl", [])
    assert message_of(read_rows, ["e.jsonl"] * 2) == "e.jsonl, e.jsonl: there is no row in it"
    assert message_of(read_texts, ["e.jsonl"] * 4) == (
        "e.jsonl, e.jsonl, e.jsonl, ...: there is no row in it"
    )


def test_plain_files_and_files_of_rows_may_be_mixed():
    Path("a.txt").write_text("one\n\ftwo", encoding="utf-8")
    put_jsonl("b.jsonl", [{"body": "three"}])
    data = read_texts(["a.txt", "b.jsonl"], "body")
    assert data.texts == ["one\n", "two", "three"]
    assert data.where == ["a.txt:1", "a.txt:2", "b.jsonl:1"]
    assert "found '.txt'" in message_of(read_labelled, ["a.txt"])


# -- Parquet and Arrow -------------------------------------------------------------------------


@pytest.fixture
def arrow():
    return pytest.importorskip("pyarrow")


def put_table(arrow, name, columns):
    table = arrow.table(columns)
    if name.endswith(".parquet"):
        from pyarrow import parquet

        parquet.write_table(table, name, row_group_size=2)
    else:
        from pyarrow import ipc

        make = ipc.new_stream if name.startswith("stream") else ipc.new_file
        with make(name, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return name


def columns_of_rows(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


ARROW_FILES = ["t.parquet", "t.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", ARROW_FILES)
def test_columns_of_a_file_become_rows(arrow, name):
    put_table(arrow, name, columns_of_rows(ROWS))
    assert rows_of(name) == [(f"{name}:{i + 1}", row) for i, row in enumerate(ROWS)]
    data = read_labelled(name)
    assert data.texts == [row["text"] for row in ROWS]
    assert (data.labels.tolist(), data.where[4]) == ([0, 1, 0, 1, 0], f"{name}:5")
    put_jsonl("a.jsonl", ROWS[:1])
    assert rows_of(["a.jsonl", name])[1][0] == f"{name}:1"


@pytest.mark.parametrize("name", ARROW_FILES)
def test_many_rows_of_a_file_are_all_read_in_order(arrow, name):
    texts = [f"t{i}" for i in range(3000)]
    put_table(arrow, name, {"text": texts, "more": list(range(3000))})
    assert read_texts(name).texts == texts


@pytest.mark.parametrize("name", ARROW_FILES)
def test_a_missing_cell_or_column_is_named(arrow, name):
    put_table(arrow, name, {"text": ["a", None], "label": [0, 1], "stars": [1, 2]})
    assert message_of(read_labelled, name) == (f"{name}:2: expected 'text' to be text, found None")
    assert message_of(read_labelled, name, "text", "star") == (
        f"{name}:1: no field 'star'; did you mean 'stars'? (found: text, label, stars)"
    )
    put_table(arrow, name, {"text": ["a", "b"], "label": [["x"], None]})
    assert message_of(read_labelled, name) == (
        f"{name}:2: 'label' is None here and ['x'] in {name}:1: "
        "expected a list in every row or in none"
    )


@pytest.mark.parametrize("name", ARROW_FILES)
def test_columns_of_every_kind_of_label(arrow, name):
    put_table(arrow, name, {"text": ["a", "b"], "label": [["x", "y"], []]})
    data = read_labelled(name)
    assert (data.problem, data.labels.tolist()) == ("multi_label", [[1, 1], [0, 0]])
    put_table(arrow, name, {"text": ["a", "b"], "label": [0.5, 2.0]})
    assert read_labelled(name, num_classes=1).labels.tolist() == [0.5, 2.0]
    expected = f"{name}:1: expected 'label' to be an integer or text, found 0.5"
    assert message_of(read_labelled, name) == expected
    category = arrow.array(["pos", "neg"]).dictionary_encode()
    put_table(arrow, name, {"text": ["a", "b"], "label": category})
    assert read_labelled(name).label_names == ["neg", "pos"]


@pytest.mark.parametrize("name", ARROW_FILES)
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_is_named(arrow, name, damage):
    put_table(arrow, name, columns_of_rows(ROWS))
    file = Path(name)
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "text": b"text,label\n" * 9,
                      "empty": b""}[damage])  # fmt: skip
    kind = "a Parquet" if name.endswith("parquet") else "an Arrow"
    message = message_of(read_rows, name)
    if damage == "empty" and kind == "an Arrow":
        assert message == f"{name}: there is no row in it"
    else:
        assert message.startswith(f"{name}: not {kind} file (")


@pytest.mark.parametrize("name", ARROW_FILES)
def test_a_text_in_another_encoding_is_named(arrow, name):
    texts = arrow.array([b"a", b"b", b"\xe9"]).view(arrow.string())
    put_table(arrow, name, {"text": texts})
    message = message_of(read_texts, name)
    assert message.startswith(f"{name}: a text of the rows ")
    assert message.endswith(" to 3 is not UTF-8")


def test_two_columns_of_one_name_are_refused(arrow):
    table = arrow.table([arrow.array(["a"]), arrow.array(["b"])], names=["text", "text"])
    assert message_of(read_rows, table) == "the data: two columns are named 'text'"


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_a_missing_library_is_named(monkeypatch, name):
    Path(name).write_bytes(b"PAR1")
    for module in [m for m in sys.modules if m.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert message_of(read_rows, name) == (
        f"{name}: files ending in {Path(name).suffix} need pyarrow: pip install 'loopos[parquet]'"
    )


# -- tables that the caller holds --------------------------------------------------------------


def tables(columns):
    """Yield `columns` in every kind of table that is installed."""
    arrow = pytest.importorskip("pyarrow")
    yield arrow.table(columns)
    for name in ("pandas", "polars"):
        if name in INSTALLED:
            yield INSTALLED[name].DataFrame(columns)
    if "datasets" in INSTALLED:
        yield INSTALLED["datasets"].Dataset.from_dict(columns)


def _installed():
    import importlib
    import warnings

    found = {}
    for name in ("pandas", "polars", "datasets"):
        with warnings.catch_warnings():  # of their own imports
            warnings.simplefilter("ignore")
            try:
                found[name] = importlib.import_module(name)
            except ImportError:
                continue
    return found


INSTALLED = _installed()
needs_pandas = pytest.mark.skipif("pandas" not in INSTALLED, reason="pandas is not installed")
needs_polars = pytest.mark.skipif("polars" not in INSTALLED, reason="polars is not installed")
needs_datasets = pytest.mark.skipif("datasets" not in INSTALLED, reason="datasets is not installed")


def test_tables_become_rows():
    for table in tables({**columns_of_rows(ROWS), "date": [f"d{i}" for i in range(5)]}):
        expected = [(f"row {i + 1}", {**row, "date": f"d{i}"}) for i, row in enumerate(ROWS)]
        assert rows_of(table) == expected
        data = read_labelled(table)
        assert data.texts == [row["text"] for row in ROWS]
        assert data.labels.tolist() == [0, 1, 0, 1, 0]
        assert data.where == [f"row {i}" for i in range(1, 6)]
        assert read_texts(table, "date").texts == [f"d{i}" for i in range(5)]
        assert message_of(read_labelled, table, "text", "dates") == (
            "row 1: no field 'dates'; did you mean 'date'? (found: text, label, date)"
        )


def test_missing_cells_of_a_table_are_named():
    for table in tables({"text": ["a", None, "c"], "label": ["x", "y", "x"]}):
        message = message_of(read_labelled, table)
        assert message.startswith("row 2: expected 'text' to be text, found ")
    for table in tables({"text": ["a", "b", "c"], "label": [0.5, 1.0, None]}):
        message = message_of(read_labelled, table, num_classes=1)
        assert message.startswith("row 3: expected 'label' to be a finite number, found ")


def test_an_empty_table_has_no_row():
    for table in tables({"text": []}):
        assert message_of(read_texts, table) == "the data: there is no row in it"


def test_lists_in_a_table_are_several_labels():
    for table in tables({"text": ["a", "b"], "label": [["x", "y"], []]}):
        data = read_labelled(table)
        assert (data.problem, data.labels.tolist()) == ("multi_label", [[1, 1], [0, 0]])


@needs_pandas
def test_pandas_columns_that_are_not_named_with_text():
    frame = INSTALLED["pandas"].DataFrame([["a", 0], ["b", 1]])
    assert message_of(read_texts, frame) == (
        "row 1: no field 'text' (found: 0, 1; the names of fields must be text)"
    )
    frame = INSTALLED["pandas"].DataFrame([["a", 0], ["b", 1]], columns=["text", 7])
    assert read_texts(frame).texts == ["a", "b"]
    frame = INSTALLED["pandas"].DataFrame([["a", 0]], columns=["text", "text"])
    assert message_of(read_texts, frame) == "the data: two columns are named 'text'"


@needs_pandas
def test_pandas_kinds_of_columns():
    pandas = INSTALLED["pandas"]
    frame = pandas.DataFrame({"text": ["a", "b"], "label": pandas.Categorical(["x", "y"])})
    assert read_labelled(frame).label_names == ["x", "y"]
    frame = pandas.DataFrame({"text": ["a", "b"], "label": pandas.array([0, None], dtype="Int64")})
    assert message_of(read_labelled, frame) == (
        "row 2: expected 'label' to be an integer or text, found None"
    )
    frame = pandas.DataFrame([{"problem": "a", "reasoning": ["s"], "answer": "1"},
                              {"problem": "b", "answer": "2"},
                              {"question": "c", "answer": "s\n#### 3"}])  # fmt: skip
    found = read_reasoning(frame, need_steps=False)
    assert [(e.problem, e.steps) for e in found] == [("a", ("s",)), ("b", ()), ("c", ("s",))]
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    frame = pandas.DataFrame([{"messages": said, "tools": [{"name": "f"}]}, {"messages": said},
                              {"prompt": "a", "completion": pandas.NaT},
                              {"prompt": "a", "completion": "b"}])  # fmt: skip
    assert message_of(read_conversations, frame).startswith("row 3: ")
    assert [c.tools is None for c in read_conversations(frame.drop(2)).conversations] == [
        False,
        True,
        True,
    ]
    # Rows are counted, whatever the index calls them.
    frame = pandas.DataFrame({"text": ["a", "b"]}, index=[10, 20])
    assert read_texts(frame).where == ["row 1", "row 2"]


@needs_datasets
def test_a_dictionary_of_datasets_needs_one_split():
    datasets = INSTALLED["datasets"]
    one = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    both = datasets.DatasetDict({"train": one, "test": one})
    assert message_of(read_rows, both) == (
        "expected one split of a DatasetDict, as in data['train'] (it has: train, test)"
    )
    assert rows_of(both["train"]) == [("row 1", {"text": "a", "label": 0})]


@needs_datasets
def test_a_dataset_may_be_in_any_format():
    datasets = INSTALLED["datasets"]
    one = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    for form in (None, "numpy", "pandas"):
        data = read_labelled(one.with_format(form))
        assert (data.texts, data.labels.tolist()) == (["a", "b"], [0, 1])
    lazy = one.to_iterable_dataset()
    assert read_labelled(lazy).texts == ["a", "b"]


@needs_polars
def test_a_polars_frame_that_is_not_collected_is_no_table():
    lazy = INSTALLED["polars"].DataFrame({"text": ["a"]}).lazy()
    expected = "expected a path or a list of mappings, found LazyFrame"
    assert message_of(read_texts, lazy) == expected


# -- configurations ----------------------------------------------------------------------------

CONFIG = {
    "model": {"d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 8, "vocab_size": 300},
    "computation": {"method": "fine_tuning"},
    "training": {"learning_rate": 0.01, "num_epochs": 1, "batch_size": 4},
    "data": {"training_data": "t.jsonl"},
}


def configure(value, key="training_data", directory="."):
    raw = json.loads(json.dumps(CONFIG))
    raw["data"][key] = value
    Path(directory).mkdir(exist_ok=True)
    path = Path(directory, "run.json")
    path.write_text(json.dumps(raw, indent=1))
    lines = path.read_text().splitlines()
    line = next(i for i, text in enumerate(lines, start=1) if f'"{key}"' in text)
    return load_config(path), f"{path}:{line}: data.{key}"


def test_a_configuration_may_name_several_files_and_patterns():
    put_jsonl("data/b.jsonl", ROWS)
    put_jsonl("data/a.jsonl", ROWS)
    put_jsonl("v.jsonl", ROWS)
    config, _ = configure("data/*.jsonl")
    assert config.paths("training_data") == [Path("data/a.jsonl"), Path("data/b.jsonl")]
    config, _ = configure(["v.jsonl", "data/a*", "builtin:sentiment_train.csv"])
    assert [path.name for path in config.paths("training_data")] == [
        "v.jsonl", "a.jsonl", "sentiment_train.csv",
    ]  # fmt: skip
    assert config.as_dict()["data"]["training_data"] == config.data.training_data
    config, _ = configure(["v.jsonl"])
    assert config.path("training_data") == Path("v.jsonl")
    config = load_config("run.json", ['data.training_data=["v.jsonl", "data/*"]'])
    assert len(config.paths("training_data")) == 3
    # A file may well be called 2024.
    assert load_config("run.json", ["data.training_data=2024"]).data.training_data == "2024"


def test_patterns_are_looked_for_beside_the_configuration_too():
    put_jsonl("there/a1.jsonl", ROWS)
    config, _ = configure("a*.jsonl", directory="there")
    assert config.paths("training_data") == [Path("there/a1.jsonl")]
    put_jsonl("a2.jsonl", ROWS)
    assert config.paths("training_data") == [Path("a2.jsonl")]


def test_data_that_a_configuration_names_in_vain_is_said_with_its_key():
    put_jsonl("a.jsonl", ROWS)
    for value, message in (
        ("b*.jsonl", "b*.jsonl: no file matches"),
        (["a.jsonl", "b*.jsonl"], "b*.jsonl: no file matches"),
        (["a.jsonl", "aa.jsonl"], "aa.jsonl: no such file or directory; did you mean 'a.jsonl'?"),
        (["builtin:zzz"], "loopos ships no 'zzz'"),
    ):
        config, place = configure(value)
        assert message_of(prepare, config, kind=MissingFileError) == f"{place}: {message}"
    config, place = configure(["a.jsonl", "a.jsonl"])
    assert message_of(config.path, "training_data", kind=ConfigError) == (
        f"{place}: expected one path, found 2"
    )
    for value, message in (
        ([], "expected text or a list of texts or null, found []"),
        (["a.jsonl", " "], "expected a path, found ' '"),
        ([3], "expected text or a list of texts or null, found [3]"),
    ):
        with pytest.raises(ConfigError, match="^run.json:") as caught:
            configure(value)
        assert str(caught.value).endswith(f": data.training_data: {message}")


def test_a_run_over_several_files_says_where_rows_stand():
    put_jsonl("data/a.jsonl", ROWS[:3])
    put_jsonl("data/b.jsonl", [{**row, "text": row["text"] + "!"} for row in ROWS[3:]])
    put_jsonl("v.jsonl", ROWS[:2])
    config, _ = configure("data/*.jsonl")
    prepared = prepare(load_config("run.json", ["data.validation_data=v.jsonl"]))
    assert prepared.training.where == [
        "data/a.jsonl:1", "data/a.jsonl:2", "data/a.jsonl:3", "data/b.jsonl:1", "data/b.jsonl:2",
    ]  # fmt: skip
    assert np.array_equal(prepared.training.labels, [0, 1, 0, 1, 0])
    put_jsonl("data/b.jsonl", [{"text": "a", "label": name} for name in "pq"])
    assert message_of(prepare, config) == (
        "data/b.jsonl:1: 'label' is 'p' here and 0 in data/a.jsonl:1: "
        "expected all integers or all names"
    )
    for name in ("a", "b"):
        put_jsonl(f"data/{name}.jsonl", [{"text": "a", "label": f"{name}{i}"} for i in range(2)])
    config = load_config("run.json", ["model.num_classes=3"])
    config_place = next(
        i for i, text in enumerate(Path("run.json").read_text().splitlines(), start=1)
        if "training_data" in text
    )  # fmt: skip
    assert message_of(prepare, config) == (
        f"run.json:{config_place}: data.training_data: 'label' has 4 different names "
        "(a0, a1, b0, b1), more than num_classes 3"
    )
