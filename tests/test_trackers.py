"""What a run tells: metrics.jsonl and the terminal."""

import io
import json

import numpy as np
import pytest

from loopos.errors import CheckpointError, OutputError
from loopos.training.samples import shown
from loopos.training.trackers import (
    Callback,
    ConsoleProgress,
    MetricsFile,
    RunInfo,
    SamplesFile,
    tell_samples,
)


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


SAMPLES = [
    {"prompt": "Say\n[bold]hi", "response": "\x1b[31mhi\x07 you", "score": 0.25, "tokens": 4,
     "ended": True},
    {"prompt": [1, 2], "response": [3] * 90, "score": -1.0, "tokens": 90, "ended": False},
]  # fmt: skip


def of_policy(number):
    figures = {"reward/score": 0.5, "kl/mean": 0.125, "response/length": 7.25}
    return {"step": number, "loss": 0.1, "tokens_per_s": 1234.0, **figures}


def test_samples_and_their_figures_as_lines():
    stream = io.StringIO()
    progress = ConsoleProgress(stream, interval_s=0.0)
    progress.on_start(RunInfo(4, 0, 8, None))
    progress.on_samples(2, SAMPLES)
    progress.on_step(of_policy(2))
    progress.on_evaluate({"step": 2, "eval": {"reward/score": 1.0, "reward/score_std": 2.0,
                                              "kl/mean": 0.5, "response/length": 3.0}})  # fmt: skip
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["step 2  prompt: Say [bold]hi", "  0.250  4 tokens: [31mhi you"]
    assert lines[2] == "step 2  prompt: 1 2"
    assert lines[3].startswith("  -1.000  90 tokens, not ended: 3 3 3 3")
    assert len(lines[3]) < 160
    assert lines[4].startswith("step 2/4  reward 0.5000  KL 0.125  length 7.2  1,234 tokens/s")
    assert lines[5] == (
        "step 2/4  evaluation: reward/score 1.0000, kl/mean 0.5000, response/length 3.0000"
    )
    progress.on_step(of_policy(3) | {"kl/mean": -4e-7})  # zero, but for rounding
    progress.on_evaluate({"step": 3, "eval": {"reward/score": 1.0, "kl/mean": -4e-7}})
    zero = stream.getvalue().splitlines()[6:]
    assert zero[0].startswith("step 3/4  reward 0.5000  KL 0.000  length 7.2")
    assert zero[1] == "step 3/4  evaluation: reward/score 1.0000, kl/mean 0.0000"
    bare = of_policy(3)
    del bare["kl/mean"]
    progress.on_step(bare)
    assert "reward 0.5000  length 7.2" in stream.getvalue()


def test_samples_in_a_table_above_the_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = ConsoleProgress(stream)
    progress.on_start(RunInfo(4, 0, 8, None))
    progress.on_samples(2, SAMPLES)
    progress.on_step(of_policy(2))
    progress.on_end()
    text = stream.getvalue()
    for part in ("samples of step 2", "Say [bold]hi", "0.250", "90+", "+: without an end",
                 "reward 0.5000", "2/4"):  # fmt: skip
        assert part in text
    assert "\x1b[31mhi" not in text
    assert "\x07" not in text


def test_long_samples_are_cut_at_either_end():
    assert shown("abcdefghij", 6) == "abc..."
    assert shown("abcdefghij", 6, end=True) == "...hij"
    assert shown("abcdef", 6) == "abcdef"
    assert shown("", 6) == ""


def test_samples_are_written_a_line_each_and_cut_on_resume(tmp_path):
    class Counting(Callback):
        seen = 0

        def on_samples(self, step, rows):
            self.seen += len(rows)

    file, counting = SamplesFile(tmp_path / "samples.jsonl"), Counting()
    tell = tell_samples([file, counting])
    file.on_start(RunInfo(4, 0, 8, tmp_path))
    for number in (1, 2, 3):
        tell(number, SAMPLES)
        file.on_step(of_policy(number))
        file.on_evaluate({"step": number, "eval": {}})
    file.on_end()
    assert counting.seen == 6
    whole = file.path.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3]
    assert rows[0] == {"step": 1, **SAMPLES[0]}
    file.path.write_text(whole + '{"step": 4, "prompt": "cut sh')
    again = SamplesFile(file.path)
    again.on_start(RunInfo(4, 2, 8, tmp_path))
    again.on_end()
    assert file.path.read_text() == "".join(whole.splitlines(keepends=True)[:4])
