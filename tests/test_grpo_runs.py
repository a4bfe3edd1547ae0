"""GRPO from a configuration: problems with answers, accuracy before and after, kill and resume."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loopos.config import load_config
from loopos.data.reasoning import read_reasoning
from loopos.data.solutions import SolutionTemplate
from loopos.data.tokenizer import load_tokenizer, train_bpe
from loopos.errors import ConfigError, DataError, InputError
from loopos.methods.chain_of_thought import ChainOfThought
from loopos.methods.reasoning import keep_template
from loopos.methods.solving import answer_in
from loopos.methods.verifiable import Options, ReasoningGRPO
from loopos.models.transformer import Transformer, TransformerConfig
from loopos.models.weights import load_model
from loopos.rehearsal import rehearse
from loopos.runner import plan, prepare, run

SIZES = {"d_model": 32, "num_heads": 2, "num_layers": 1, "d_ff": 64, "vocab_size": 300}
CONFIG = {
    "model": SIZES | {"max_seq_len": 64},
    "computation": {"method": "grpo", "num_threads": 1},
    "training": {"learning_rate": 0.003, "batch_size": 4, "num_epochs": 1, "max_new_tokens": 6,
                 "group_size": 4, "save_steps": 2, "eval_steps": 4, "sample_steps": 3},
    "data": {"reasoning_examples": "t.jsonl", "output_dir": "out", "validation_fraction": 0.25},
}  # fmt: skip
TIMED = ("time_s", "tokens_per_s", "time/rollout_s", "time/reward_s", "time/update_s")


def problems(count=24):
    """Return rows without steps: the answer is the number that stands in the problem."""
    return [{"problem": f"Say {i % 5} to {i}x.", "answer": str(i % 5)} for i in range(count)]


def write_project(directory):
    rows = [json.dumps(row) + "\n" for row in problems()]
    (directory / "t.jsonl").write_text("".join(rows), encoding="utf-8")
    (directory / "run.json").write_text(json.dumps(CONFIG, indent=1))


@pytest.fixture
def configure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    return lambda *overrides: load_config("run.json", overrides)


def refused(action, *arguments, kind=InputError):
    with pytest.raises(kind) as caught:
        action(*arguments)
    (line,) = str(caught.value).splitlines()
    return line


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def outcome(directory):
    names = ("model/model.safetensors", "model/reasoning.json", "samples.jsonl", "start.json",
             "evaluation.json")  # fmt: skip
    found = {name: (directory / name).read_bytes() for name in names}
    found["metrics"] = [{k: v for k, v in record.items() if k not in TIMED}
                        for record in lines(directory / "metrics.jsonl")]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    write_project(directory)
    here = Path.cwd()
    os.chdir(directory)
    try:
        run(load_config("run.json"))
    finally:
        os.chdir(here)
    return directory / "out"


def test_a_run_says_how_many_problems_are_solved_before_and_after(trained):
    found = json.loads((trained / "evaluation.json").read_text())
    start = json.loads((trained / "start.json").read_text())
    assert found["accuracy_before"] == start["accuracy"]
    assert found["accuracy"] == found["solved"] / found["asked"]
    assert found["asked"] == 6
    assert 0 <= found["score"] <= 1
    assert "kl" in found
    rows = lines(trained / "samples.jsonl")
    assert [row["step"] for row in rows] == [3] * 16  # four prompts, four responses to each
    assert all(row["prompt"].startswith("Problem: Say ") for row in rows)
    assert {row["score"] for row in rows} <= {0.0, 1.0}
    template = SolutionTemplate()
    answers = {row["problem"]: row["answer"] for row in problems()}
    for row in rows:
        wanted = answers[row["prompt"].removeprefix("Problem: ").partition("\n")[0]]
        given = answer_in(row["response"], template)
        assert row["score"] == (given is not None and float(given) == float(wanted))


def test_what_it_saves_solves_problems(trained):
    solver = ChainOfThought(trained / "model")
    examples = read_reasoning(trained.parent / "t.jsonl", need_steps=False)
    figures = solver.evaluate(examples)
    assert figures["asked"] == 24
    made = ReasoningGRPO(load_model(trained / "model"), load_tokenizer(trained / "model"))
    options = Options(max_new_tokens=256)
    assert made.evaluate(examples, options)["accuracy"] == figures["accuracy"]


KILLED = """
import os, signal, sys
from loopos.config import load_config
from loopos.runner import run
from loopos.training.trackers import Callback

class Kill(Callback):
    def on_step(self, record):
        if record["step"] == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)

config = load_config("run.json")
run(config, resume=(config.output_dir / "config.json").exists(), callbacks=[Kill()])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_run_goes_on_to_the_same_bytes(trained, configure, tmp_path):
    for step in (1, 3, 4):
        done = subprocess.run([sys.executable, "-c", KILLED, str(step)], cwd=tmp_path,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
    run(configure(), resume=True)
    assert outcome(tmp_path / "out") == outcome(trained)


def test_a_model_is_asked_as_it_was_trained_to_be(configure):
    tokenizer = train_bpe([f"{r['problem']} {r['answer']} Q A" for r in problems()], 290)
    policy = Transformer(TransformerConfig(**CONFIG["model"]), seed=1)
    policy.save("policy", tokenizer)
    template = SolutionTemplate(prompt="Q {problem} ", answer="A {answer}")
    keep_template("policy", template, None)
    overrides = ("data.pretrained_weights=policy",)
    trainer = prepare(configure(*overrides)).trainer
    assert trainer._write.template == template
    own = 'training.prompt_template="{problem}?"'
    trainer = prepare(configure(*overrides, own)).trainer
    assert trainer._write.template == SolutionTemplate("{problem}?", "{step}\n", "A {answer}")
    run(configure(*overrides, own))
    kept = json.loads(Path("out/model/reasoning.json").read_text())
    assert kept["template"] == trainer._write.template.as_dict()


def test_its_plan_and_estimate(configure):
    config = configure("training.num_epochs=2")
    found = plan(config, prepare(config))
    assert (found.steps_per_epoch, found.total_steps, found.stages) == (5, 10, {})
    estimate = rehearse(config, ["training.num_epochs=2"])
    assert estimate.total_s > 10 * estimate.step_s > 0
    assert estimate.stages_s == {}


CHANGES = {
    "group_size": 2, "scale": "none", "baseline": None, "kl_coefficient": 0.5,
    "prompt_template": "{problem}", "max_new_tokens": 3,
}  # fmt: skip


@pytest.mark.parametrize("option", CHANGES)
def test_each_option_changes_the_result(trained, configure, option):
    given = [f"training.{option}={json.dumps(CHANGES[option])}"]
    if option == "baseline":
        given = ["training.baseline=leave_one_out", "training.scale=none"]
    run(configure(*given))
    name = "model/model.safetensors"
    assert (Path("out") / name).read_bytes() != (trained / name).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.group_size=1"], "training.group_size: expected at least 2, found 1"),
        (["training.scale=groups"], "did you mean 'group'?"),
        (["training.answer_template=x"], "training.answer_template: expected {answer} once"),
        (["training.eval_problems=0"], "training.eval_problems: expected at least 1, found 0"),
        (["training.grup_size=4"], "unknown key; did you mean 'group_size'?"),
        (["training.critic=shared"], "unknown key here; it belongs to the method 'rlhf'"),
        (["data.reward_model=x"], "data.reward_model: only the method 'rlhf' reads it"),
        (["data.preference_data=x"], "the method 'grpo' reads data.reasoning_examples"),
    ],
)  # fmt: skip
def test_bad_configurations_are_refused_in_one_sentence(configure, overrides, message):
    assert message in refused(configure, *overrides, kind=ConfigError)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "t.jsonl: there is no row in it"),
        ([{"problem": "a"}], "t.jsonl:1: no field 'answer'"),
        ([problems()[0], {"problem": "x " * 90, "answer": "1"}],
         "t.jsonl:2: the problem has "),
    ],
)  # fmt: skip
def test_bad_data_is_refused_in_one_sentence(configure, rows, message):
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configure("data.validation_fraction=0", "training.eval_steps=null")
    assert refused(prepare, config, kind=DataError).startswith(message)


def test_chat_without_a_template_is_refused(configure):
    assert "no chat template" in refused(prepare, configure("training.chat=true"))


def test_answers_are_learnt():
    """From a reward alone: the answer to each problem is one token, which the problem names."""
    rows = problems(40)
    tokenizer = train_bpe([f"{r['problem']} Answer: {r['answer']}" for r in rows], 290,
                          individual_digits=True)  # fmt: skip
    policy = Transformer(TransformerConfig(**SIZES, max_seq_len=64), seed=1)
    solver = ChainOfThought(policy, tokenizer)  # which has seen a few solutions
    steps = [row | {"reasoning": ["So."]} for row in rows[:20]]
    solver.fit(read_reasoning(steps), num_epochs=20, learning_rate=3e-3, eval_problems=0)
    trainer = ReasoningGRPO(solver.model, tokenizer)
    training = read_reasoning(rows, need_steps=False)
    # After 15 epochs the gain is 0.07 to 0.14, by seed and rounding; after 45 it is 0.11 to 0.17.
    options = Options(max_new_tokens=16, batch_size=8, learning_rate=2e-3, num_epochs=45,
                      kl_coefficient=0.0)  # fmt: skip
    before = trainer.evaluate(training, options)["accuracy"]
    result = trainer.fit(training, options=options)
    scores = [record["reward/score"] for record in result.history]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.1
    # Greedily too. Nothing here rewards an end, without which an answer does not count as solved:
    # of eight runs (four seeds, two instruction sets) none ended, and they earned 0.13 to 0.3.
    assert trainer.evaluate(training, options)["score"] > before + 0.05
