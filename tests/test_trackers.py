"""What a run tells: metrics.jsonl and the terminal."""

import io
import json

import numpy as np
import pytest

from loopos.errors import CheckpointError, OutputError
from loopos.training.trackers import ConsoleProgress, MetricsFile, RunInfo


def step(number, loss=0.5):
    return {"step": number, "epoch": 0, "loss": loss, "tokens_per_s": 1234.5}


def evaluation(number):
    figures = {"loss": 0.25, "accuracy": 0.75, "per_class": {}, "count": 4}
    return {"step": number, "eval": figures}


def test_one_object_a_line_flushed_as_it_goes(tmp_path):
    file = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    file.on_start(RunInfo(2, 0, 4, tmp_path))
    file.on_step(step(1))
    assert json.loads(file.path.read_text()) == step(1)
    file.on_evaluate(evaluation(1))
    file.on_end()
    lines = file.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [step(1), evaluation(1)]


@pytest.mark.parametrize(
    ("start", "due", "kept"), [(0, False, 0), (1, False, 2), (1, True, 1), (2, False, 3)]
)
def test_resume_keeps_what_came_before_the_checkpoint(tmp_path, start, due, kept):
    path = tmp_path / "metrics.jsonl"
    records = [step(1), evaluation(1), step(2)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 3, "lo')
    file = MetricsFile(path)
    file.on_start(RunInfo(9, start, 4, tmp_path, due))
    file.on_end()
    assert [json.loads(line) for line in path.read_text().splitlines()] == records[:kept]


def test_a_figure_that_json_does_not_know_is_refused(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(RunInfo(2, 0, 4, tmp_path))
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.on_step(step(1, float("nan")))
    file.on_end()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"metrics.jsonl: cannot be written"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl").on_start(RunInfo(1, 0, 1, None))


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = ConsoleProgress(stream, interval_s=0.0)
    progress.on_start(RunInfo(4, 2, 8, None))
    progress.on_step(step(3))
    progress.on_evaluate(evaluation(3))
    progress.on_end()
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 3/4  loss 0.5000  1,234 tokens/s  0:00 left")
    assert second == "step 3/4  evaluation: loss 0.2500, accuracy 0.7500"
    assert "\x1b" not in stream.getvalue()


def test_lines_keep_their_distance():
    stream = io.StringIO()
    progress = ConsoleProgress(stream, interval_s=1000.0)
    progress.on_start(RunInfo(4, 0, 8, None))
    progress.on_step(step(1))
    progress.on_end()
    assert stream.getvalue() == ""


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = ConsoleProgress(stream)
    progress.on_start(RunInfo(4, 0, 8, None))
    progress.on_step(step(3))
    progress.on_evaluate(evaluation(3))
    progress.on_end()
    text = stream.getvalue()
    assert "3/4" in text
    assert "loss 0.5000" in text
    assert "evaluation: loss 0.2500, accuracy 0.7500" in text


def test_plain_lines_on_a_terminal_that_cannot_move_its_cursor(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    progress = ConsoleProgress(stream, interval_s=0.0)
    progress.on_start(RunInfo(4, 2, 8, None))
    progress.on_step(step(3))  # a bar would be shown once, at the end
    assert stream.getvalue() == "step 3/4  loss 0.5000  1,234 tokens/s  0:00 left\n"
    progress.on_end()


def test_a_damaged_line_is_named_and_the_file_left_as_it_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in ("{oops", "[1]", '{"loss": 1}'):
        path.write_text(f"{json.dumps(step(1))}\n{line}\n{json.dumps(step(3))}\n")
        before = path.read_bytes()
        with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: not the record of a step"):
            MetricsFile(path).on_start(RunInfo(9, 3, 4, tmp_path))
        assert path.read_bytes() == before


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(RunInfo(2, 0, 4, tmp_path))
    figures = {"f1": np.float32(0.5), "count": np.int64(3), "rows": np.eye(2, dtype=int)}
    file.on_evaluate({"step": 1, "eval": figures})
    file.on_end()
    found = json.loads(file.path.read_text())["eval"]
    assert found == {"f1": 0.5, "count": 3, "rows": [[1, 0], [0, 1]]}


def test_figures_of_ones_own_are_shown():
    stream = io.StringIO()
    progress = ConsoleProgress(stream)
    progress.on_start(RunInfo(4, 0, 8, None))
    progress.on_evaluate({"step": 1, "eval": {"reward": np.float64(1.5), "count": 4}})
    assert stream.getvalue() == "step 1/4  evaluation: reward 1.5000\n"
