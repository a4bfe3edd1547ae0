"""The chain-of-thought demo, made small: what it says, writes and promises."""

import dataclasses
import json

import pytest

from loopos import demo_reasoning
from loopos.demo_reasoning import OPTIONS, ReasoningResult, run_reasoning_demo

SMALL = dataclasses.replace(
    OPTIONS, max_steps=3, eval_problems=4, eval_samples=2, max_new_tokens=12, warmup_steps=1
)


def test_a_small_run_says_what_it_came_to(tmp_path, capsys):
    code = run_reasoning_demo(tmp_path / "out", problems=40, options=SMALL)
    shown = capsys.readouterr()
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["asked"], result["seed"]) == (4, 0)
    assert code == int(result["after"] < 0.5)
    assert "4 unseen problems, solved" in shown.out
    assert f"after training       {result['after']:6.1%}" in shown.out
    assert (tmp_path / "out" / "model" / "reasoning.json").exists()
    again = run_reasoning_demo(tmp_path / "out", problems=40, options=SMALL)
    assert "is not empty, so this run goes to" in capsys.readouterr().out
    assert again == code
    second = json.loads((tmp_path / "out-2" / "result.json").read_text())
    assert {k: second[k] for k in ("before", "after", "voted")} == {
        k: result[k] for k in ("before", "after", "voted")
    }


def test_it_stops_when_asked(tmp_path, capsys):
    assert run_reasoning_demo(tmp_path / "o", problems=40, options=SMALL, stop=lambda: True) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("after", "faults"), [(0.5, 0), (0.49, 1)])
def test_what_is_promised(after, faults):
    assert len(ReasoningResult(0.0, after, after, 200, 1.0, 2.0).faults) == faults


def test_nothing_asked_was_learnt_from():
    kinds = [
        demo_reasoning.make_problems(count, seed=0, levels=(demo_reasoning.LEVEL,), split=split)
        for count, split in ((2000, "train"), (demo_reasoning.ASKED, "test"))
    ]
    trained, asked = ({"".join(p["reasoning"]) for p in found} for found in kinds)
    assert not trained & asked
