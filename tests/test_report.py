"""The data report, figure by figure against data counted by hand."""

import json

import numpy as np
import pytest

from loopos.data.readers import LabelledTexts, Texts, read_labelled, split
from loopos.data.report import DataReport, Finding
from loopos.errors import DataError

NAMES = ["neg", "neutral", "pos"]


def labelled(name, rows, dropped=()):
    texts = [text for text, _ in rows]
    where = [f"{name}:{i + 1}" for i in range(len(rows))]
    labels = np.array([label for _, label in rows], dtype=np.int64)
    return LabelledTexts(texts, where, labels, NAMES, dropped=list(dropped))


TRAINING = labelled(
    "t.jsonl",
    [("a", 0), ("b", 0), ("a", 0), ("c", 2), ("b", 2), ("d", 0), ("a", 2)],
    dropped=["t.jsonl:8", "t.jsonl:11"],
)
VALIDATION = labelled(
    "v.jsonl", [("e", 0), ("c", 0), ("e", 0), ("d", 0), ("f", 2)], dropped=["v.jsonl:6"]
)
LENGTHS = np.array([1, 4, 1, 9, 4, 30, 1])


@pytest.fixture
def report():
    return DataReport.build(TRAINING, VALIDATION, LENGTHS, 8, np.array([2, 9, 2, 30, 8]))


def test_every_figure(report):
    assert (report.rows, report.validation_rows) == (7, 5)
    assert report.classes == {"neg": 4, "neutral": 0, "pos": 3}
    assert report.validation_classes == {"neg": 4, "neutral": 0, "pos": 1}
    assert report.tokens == 50
    assert report.max_length == 8
    assert report.truncated == Finding(4, ["t.jsonl:4", "t.jsonl:6", "v.jsonl:2", "v.jsonl:4"])
    assert report.dropped == Finding(3, ["t.jsonl:8", "t.jsonl:11", "v.jsonl:6"])
    assert report.duplicates == Finding(4, ["t.jsonl:3", "t.jsonl:5", "t.jsonl:7", "v.jsonl:3"])
    # "b" and "a" in the training set, "c" from there to the validation set; "d" agrees.
    assert report.conflicts == Finding(3, ["t.jsonl:5", "t.jsonl:7", "v.jsonl:2"])
    assert report.leaks == Finding(2, ["v.jsonl:2", "v.jsonl:4"])
    assert report.warnings == [
        "no row has the class neutral",
        "no validation row has the class neutral",
        "33% of the texts are cut to 8 tokens",
        "3 rows repeat a text with another label",
        "2 of 5 validation texts stand in the training set too: the evaluation flatters the model",
    ]


def test_quantiles_are_lengths_that_occur():
    data = Texts([f"t{i}" for i in range(101)], [f"row {i}" for i in range(101)])
    lengths = np.random.default_rng(0).permutation(101) * 10
    found = DataReport.build(data, None, lengths, None).lengths
    assert found == {
        "min": 0, "5%": 50, "25%": 250, "median": 500, "75%": 750, "95%": 950, "max": 1000,
    }  # fmt: skip
    one = DataReport.build(data.take([0]), None, np.array([7]), None).lengths
    assert set(one.values()) == {7}


def test_a_clean_set_has_no_findings():
    data = labelled("t", [("a", 0), ("b", 1), ("c", 2)])
    report = DataReport.build(data, None, np.array([1, 2, 3]), 3)
    for finding in ("truncated", "dropped", "duplicates", "conflicts", "leaks"):
        assert getattr(report, finding) == Finding(0, [])
    assert report.warnings == []
    assert report.lines() == [
        "rows           3 training, 0 validation",
        "classes        neg 1 (33%), neutral 1 (33%), pos 1 (33%)",
        "tokens         6 (min 1, 5% 1, 25% 1, median 2, 75% 3, 95% 3, max 3)",
        "cut to 3       none",
        "dropped        none",
        "duplicates     none",
        "conflicts      none",
        "leaks          none",
    ]


def test_texts_without_labels_have_no_classes():
    training = Texts(["a", "a", "b"], ["row 1", "row 2", "row 3"])
    validation = Texts(["b"], ["row 1"])
    report = DataReport.build(training, validation, np.array([1, 1, 2]), None, np.array([2]))
    assert (report.classes, report.validation_classes) == ({}, {})
    assert report.conflicts == Finding(0, [])
    assert (report.duplicates, report.leaks) == (Finding(1, ["row 2"]), Finding(1, ["row 1"]))
    assert [line.split()[0] for line in report.lines()][:2] == ["rows", "tokens"]
    assert not any(line.startswith("cut to") for line in report.lines())


def test_the_lines_for_a_person(report):
    assert report.lines() == [
        "rows           7 training, 5 validation",
        "classes        neg 4 (57%), pos 3 (43%), neutral 0 (0%)",
        "  validation   neg 4 (80%), pos 1 (20%), neutral 0 (0%)",
        "tokens         50 (min 1, 5% 1, 25% 1, median 4, 75% 4, 95% 30, max 30)",
        "cut to 8       4 (t.jsonl:4, :6, v.jsonl:2, :4)",
        "dropped        3 (t.jsonl:8, :11, v.jsonl:6)",
        "duplicates     4 (t.jsonl:3, :5, :7, v.jsonl:3)",
        "conflicts      3 (t.jsonl:5, :7, v.jsonl:2)",
        "leaks          2 (v.jsonl:2, :4)",
        "warning:       no row has the class neutral",
        "warning:       no validation row has the class neutral",
        "warning:       33% of the texts are cut to 8 tokens",
        "warning:       3 rows repeat a text with another label",
        "warning:       2 of 5 validation texts stand in the training set too: the",
        "               evaluation flatters the model",
    ]


def test_many_places_are_counted_and_the_first_shown():
    data = labelled("data/reviews/train.jsonl", [("same", 0)] * 40)
    report = DataReport.build(data, None, np.full(40, 3), 2)
    assert report.duplicates.count == 39
    assert report.duplicates.places == [f"data/reviews/train.jsonl:{i}" for i in range(2, 7)]
    assert str(report.duplicates) == "39 (data/reviews/train.jsonl:2, :3, :4, :5, :6, ...)"
    assert str(Finding.of(["row 3", "row 4"])) == "2 (row 3, row 4)"
    assert report.truncated.count == 40
    assert "100% of the texts are cut to 2 tokens" in report.warnings


def test_lines_fit_a_terminal():
    names = [f"class number {i}" for i in range(30)]
    rows = [(f"t{i % 20}", i % 11) for i in range(60)]
    where = [f"a/rather/long/path/to/some/data/part-{i % 3}.jsonl:{i}" for i in range(60)]
    data = LabelledTexts(
        [text for text, _ in rows], where, np.array([label for _, label in rows]), names
    )
    report = DataReport.build(data, data, np.full(60, 10**6), 10**5)
    lines = report.lines()
    assert max(map(len, lines)) <= 78
    text = " ".join(" ".join(lines).split())
    assert "class number 7 5 (8%) and 22 more" in text.replace("(9%)", "(8%)")
    assert (
        "no row has the class class number 11, class number 12, class number 13, "
        "class number 14, class number 15, class number 16, class number 17, class number 18 "
        "and 11 more" in text.replace(" warning:", "")
    )


def test_classes_out_of_balance_are_said():
    rows = [(f"t{i}", 2 * (i >= 44)) for i in range(48)]
    report = DataReport.build(labelled("t", rows), None, np.ones(48, int), 8)
    assert report.warnings == [
        "no row has the class neutral",
        "the classes are out of balance, 44 rows to 4: consider class_weights 'balanced'",
    ]
    report = DataReport.build(labelled("t", rows[4:]), None, np.ones(44, int), 8)
    assert report.warnings == ["no row has the class neutral"]


def test_an_empty_validation_set_is_no_fault():
    report = DataReport.build(TRAINING, labelled("v", []), LENGTHS, 8, np.array([], int))
    assert report.validation_classes == {"neg": 0, "neutral": 0, "pos": 0}
    assert "  validation   neg 0 (0%), neutral 0 (0%), pos 0 (0%)" in report.lines()


def test_an_empty_training_set_is_one():
    with pytest.raises(DataError, match=r"^there is no text to train on$"):
        DataReport.build(Texts([], []), None, np.array([], int), None)


def test_the_report_is_json(report):
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["truncated"] == {"count": 4, "places": report.truncated.places}
    assert values["classes"] == {"neg": 4, "neutral": 0, "pos": 3}
    assert values["warnings"] == report.warnings
    assert list(values) == [
        "rows", "validation_rows", "problem", "classes", "validation_classes", "unlabelled",
        "validation_unlabelled", "targets", "validation_targets", "tokens", "lengths",
        "max_length", "truncated", "dropped", "duplicates", "conflicts", "leaks", "held_out",
        "warnings",
    ]  # fmt: skip


def of(name, problem, labels, texts=None, names=()):
    texts = [f"{name}{i}" for i in range(len(labels))] if texts is None else texts
    where = [f"{name}.csv:{i + 2}" for i in range(len(labels))]
    return LabelledTexts(texts, where, np.array(labels), list(names), problem=problem)


def test_numbers_to_predict_have_quantiles_and_no_classes():
    targets = np.random.default_rng(0).permutation(101) / 100 - 0.25
    training = of("t", "regression", targets, ["same", *(f"x{i}" for i in range(99)), "same"])
    validation = of("v", "regression", [1.25, -3.0, 1e6], ["same", "x0", "b"])
    report = DataReport.build(training, validation, np.full(101, 2), 8, np.array([1, 1, 1]))
    assert report.problem == "regression"
    assert report.targets == {
        "min": -0.25, "5%": -0.2, "25%": 0.0, "median": 0.25, "75%": 0.5, "95%": 0.7, "max": 0.75,
    }  # fmt: skip
    assert report.validation_targets["median"] == 1.25
    assert (report.classes, report.validation_classes) == ({}, {})
    assert report.conflicts == Finding(3, ["t.csv:102", "v.csv:2", "v.csv:3"])
    assert report.lines() == [
        "rows           101 training, 3 validation",
        "targets        min -0.25, 5% -0.2, 25% 0, median 0.25, 75% 0.5, 95% 0.7,",
        "               max 0.75",
        "  validation   min -3, 5% -3, 25% -3, median 1.25, 75% 1e+06, 95% 1e+06,",
        "               max 1e+06",
        "tokens         202 (min 2, 5% 2, 25% 2, median 2, 75% 2, 95% 2, max 2)",
        "cut to 8       none",
        "dropped        none",
        "duplicates     1 (t.csv:102)",
        "conflicts      3 (t.csv:102, v.csv:2, :3)",
        "leaks          2 (v.csv:2, :3)",
        "warning:       3 rows repeat a text with another target",
        "warning:       2 of 3 validation texts stand in the training set too: the",
        "               evaluation flatters the model",
    ]
    same = DataReport.build(of("t", "regression", [3.0, 3.0]), None, np.ones(2), 8)
    assert same.warnings == []
    assert set(same.targets.values()) == {3.0}


def test_several_labels_are_counted_one_by_one():
    names = ["film", "food", "sport"]
    rows = [[1, 0, 0]] * 30 + [[1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    texts = [f"t{i}" for i in range(30)] + ["a", "b", "a", "t0"]
    training = of("t", "multi_label", np.array(rows, np.int8), texts, names)
    validation = of(
        "v", "multi_label", np.array([[0, 1, 1], [1, 1, 0]], np.int8), ["b", "a"], names
    )
    report = DataReport.build(training, validation, np.ones(34), 8, np.ones(2))
    assert report.problem == "multi_label"
    assert report.classes == {"film": 32, "food": 1, "sport": 0}
    assert report.validation_classes == {"film": 1, "food": 2, "sport": 1}
    assert (report.unlabelled, report.validation_unlabelled) == (2, 0)
    assert (report.targets, report.validation_targets) == ({}, {})
    assert report.conflicts == Finding(2, ["t.csv:34", "v.csv:2"])
    assert report.lines()[:4] == [
        "rows           34 training, 2 validation",
        "labels         film 32 (94%), food 1 (3%), sport 0 (0%); no label 2 (6%)",
        "  validation   food 2 (100%), film 1 (50%), sport 1 (50%); no label 0 (0%)",
        "tokens         34 (min 1, 5% 1, 25% 1, median 1, 75% 1, 95% 1, max 1)",
    ]
    # A rare label is no fault, one that nothing has is.
    assert report.warnings == [
        "no row has the label sport",
        "2 rows repeat a text with another set of labels",
        "2 of 2 validation texts stand in the training set too: the evaluation flatters the model",
    ]
    json.dumps(report.to_dict(), allow_nan=False)


def test_labels_are_compared_by_name():
    one = of("t", "classification", [0, 1], ["a", "b"], ["x", "y"])
    other = of("v", "classification", [1, 1], ["a", "b"], ["y", "x"])
    report = DataReport.build(one, other, np.ones(2), None)
    assert report.conflicts == Finding(1, ["v.csv:3"])
    several = of("v", "multi_label", np.array([[1]], np.int8), ["a"], ["x"])
    with pytest.raises(DataError) as caught:
        DataReport.build(one, several, np.ones(2), None)
    assert str(caught.value) == (
        "the training data is for classification, the validation data for multi_label"
    )


def test_places_are_those_of_the_file(tmp_path):
    path = tmp_path / "t.jsonl"
    texts = ["one", "two", "", "one", "three", "four", "five", "one"]
    lines = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
    path.write_text("\n\n".join(lines))
    data = read_labelled(path)
    training, validation = split(data, 0.4, seed=0)
    lengths = np.array([len(text) for text in training.texts])
    report = DataReport.build(training, validation, lengths, None)
    assert report.dropped == Finding(1, [f"{path}:5"])
    assert report.duplicates == Finding(2, [f"{path}:7", f"{path}:15"])
    assert report.conflicts == Finding(2, [f"{path}:7", f"{path}:15"])
    assert report.leaks == Finding(0, [])
