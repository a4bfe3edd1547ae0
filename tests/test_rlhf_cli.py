"""RLHF and GRPO on the command line, in processes of their own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "loopos"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("LOOPOS", "COLUMNS"))} | {
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
SIZES = {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 300,
         "max_seq_len": 48}  # fmt: skip
TRAINING = {"learning_rate": 0.003, "num_epochs": 1, "max_new_tokens": 6}
RLHF = {
    "model": SIZES,
    "computation": {"method": "rlhf"},
    "training": TRAINING | {"batch_size": 8, "sample_steps": 2, "reward_model": {"batch_size": 8}},
    "data": {"preference_data": "p.jsonl", "output_dir": "rlhf", "validation_fraction": 0.2},
}
GRPO = {
    "model": SIZES,
    "computation": {"method": "grpo"},
    "training": TRAINING | {"batch_size": 4, "group_size": 4, "sample_steps": 3},
    "data": {"reasoning_examples": "t.jsonl", "output_dir": "grpo", "validation_fraction": 0.25},
}


def loopos(*arguments, cwd, code=0):
    """Run a command; assert its exit code, and that no traceback is to be seen."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, capture_output=True,
        text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr  # neither is a terminal
    return done.stdout, done.stderr


def refused(*arguments, cwd):
    """Return the one sentence with which a command is refused."""
    out, err = loopos(*arguments, cwd=cwd, code=2)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pairs():
    """Return 40 pairs of responses to 20 prompts; the chosen ones are polite."""
    said = {"chosen": ("yes", "good", "fine"), "rejected": ("no", "bad", "dull")}
    return [
        {"prompt": f"The hen {i // 2} says"}
        | {
            side: f" {words[i % 3]} {words[i % 2]}" + " so" * (i % 4)
            for side, words in said.items()
        }
        for i in range(40)
    ]


def problems():
    """Return rows without steps: the answer is the number that stands in the problem."""
    return [{"problem": f"Say {i % 5} to {i}x.", "answer": str(i % 5)} for i in range(24)]


def write_project(directory):
    write_rows(directory / "p.jsonl", pairs())
    write_rows(directory / "t.jsonl", problems())
    for name, config in (("rlhf.json", RLHF), ("grpo.json", GRPO)):
        (directory / name).write_text(json.dumps(config, indent=1))


@pytest.fixture
def project(tmp_path):
    write_project(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a directory with a finished run in ``rlhf``, and what the command printed."""
    directory = tmp_path_factory.mktemp("trained")
    write_project(directory)
    return directory, *loopos("run", "rlhf.json", cwd=directory)


def test_a_run_shows_both_phases_samples_and_what_it_came_to(trained):
    directory, out, err = trained
    lines = out.splitlines()
    assert lines[:3] == [
        "data", "  rows           32 training, 8 validation",
        "  prompts        16 training, 4 held out",
    ]  # fmt: skip
    assert [line for line in lines if line.startswith("run")] == ["run: reward_model", "run: ppo"]
    assert "  4 optimizer steps" in lines
    assert "  2 optimizer steps" in lines
    assert lines[lines.index("evaluation") - 1].startswith("2 steps, finished")
    figures = dict(line.split() for line in lines[lines.index("evaluation") + 1 : -2])
    kept = json.loads((directory / "rlhf/evaluation.json").read_text())
    for name in ("score", "score_before", "score_gain", "kl", "reward_accuracy"):
        assert float(figures[name]) == pytest.approx(kept[name], abs=1e-4)
    assert lines[-2:] == ["saved in rlhf", "next: loopos generate rlhf --prompt 'a prompt'"]
    told = err.splitlines()
    samples = [line for line in told if line.startswith("step 2  prompt: The ")]
    assert len(samples) == 3
    below = told[told.index(samples[0]) + 1]
    assert re.match(r"  -?\d\.\d{3}  \d tokens(, not ended)?: ", below)
    assert any(re.match(r"step 2/2  evaluation: reward/score -?\d", line) for line in told)


def test_what_takes_a_while_is_said_when_it_begins(project):
    rows = [{"prompt": f"Say {i}", "chosen": "fine " * 40, "rejected": "bad " * 40}
            for i in range(500)]  # fmt: skip
    write_rows(project / "long.jsonl", rows)
    asked = ["--set", "data.preference_data=long.jsonl", "--set", "model.max_seq_len=4"]
    _, err = loopos("run", "rlhf.json", *asked, cwd=project, code=2)  # too long for the model
    first, second, error = err.splitlines()
    told = f"training a tokenizer of {SIZES['vocab_size']} tokens"
    assert (first, second) == ("reading data", told)
    assert error.startswith("error: ")
    # Of a few rows nobody waits for them.
    refused("run", "rlhf.json", *asked[2:], cwd=project)


def test_the_printed_command_works(trained):
    directory, out, _ = trained
    command = shlex.split(out.splitlines()[-1].removeprefix("next: "))
    said, err = loopos(*command[1:], "--max-new-tokens", "4", cwd=directory)
    assert "tokens in " in err
    assert said


def test_evaluate_lets_the_policy_answer_and_the_reward_model_judge(trained):
    directory, _, _ = trained
    out, _ = loopos("evaluate", "rlhf", "p.jsonl", "--json", cwd=directory)
    figures = json.loads(out)
    assert figures["prompts"] == 20
    assert 1 <= figures["length"] <= 6
    assert figures["reward_accuracy"] == figures["reward_model"]["accuracy"]
    alone, _ = loopos("evaluate", "rlhf/reward_model", "p.jsonl", "--json", cwd=directory)
    assert json.loads(alone) == figures["reward_model"]
    assert refused("evaluate", "rlhf", "pp.jsonl", cwd=directory).startswith(
        "pp.jsonl: no such file; did you mean 'p.jsonl'?"
    )


def test_evaluate_tells_an_unfinished_run(trained, tmp_path):
    shutil.copytree(trained[0] / "rlhf", tmp_path / "rlhf")
    shutil.rmtree(tmp_path / "rlhf/model")
    write_rows(tmp_path / "p.jsonl", pairs())
    assert refused("evaluate", "rlhf", "p.jsonl", cwd=tmp_path) == (
        "rlhf: this run has not finished, so there is no model in it; "
        "continue it with 'loopos run CONFIG --resume'"
    )


def test_validate_says_what_both_phases_would_take(project):
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    out, err = loopos("validate", "rlhf.json", cwd=project)
    lines = out.splitlines()
    start = lines.index("run")
    assert lines[start + 1 : start + 3] == [
        "  reward_model: 4 optimizer steps an epoch, 4 in all",
        "  ppo: 2 optimizer steps an epoch, 2 in all",
    ]
    time = r"[\d.]+ m?s"
    assert re.fullmatch(
        rf"  time {time} \(reward_model {time}, ppo {time}, {time} a step, {time} an evaluation, "
        rf"{time} a checkpoint\)",
        lines[-2],
    )
    assert (lines[-1], err) == ("rlhf.json: fine", "")
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_grpo_is_run_and_evaluated(project):
    out, err = loopos("run", "grpo.json", cwd=project)
    lines = out.splitlines()
    figures = dict(line.split() for line in lines[lines.index("evaluation") + 1 : -2])
    assert {"accuracy", "accuracy_before", "score", "kl"} <= set(figures)
    assert any(line.startswith("step 3  prompt: Problem: Say ") for line in err.splitlines())
    out, _ = loopos("evaluate", "grpo", "t.jsonl", "--json", cwd=project)
    assert json.loads(out)["asked"] == 24
    out, _ = loopos("validate", "grpo.json", cwd=project)
    assert "  5 optimizer steps an epoch, 5 in all" in out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "training.preset=trll"],
         "--set training.preset: expected one of 'openai-2019', 'tldr-2024', 'trl' or null, "
         "found \"trll\"; did you mean 'trl'?"),
        (["--set", "data.preference_data=pp.jsonl"],
         "--set data.preference_data: pp.jsonl: no such file or directory; "
         "did you mean 'p.jsonl'?"),
        (["--set", "data.pretrained_weights=w"],
         "--set data.pretrained_weights: w: no such file or directory"),
        (["--set", 'training.phases=["ppo"]'],
         "rlhf.json: data.reward_model: is needed where training.phases trains none"),
        (["--set", "training.reward_model.batch_sizes=4"],
         "--set training.reward_model.batch_sizes: unknown key; did you mean 'batch_size'?"),
        (["--resume"], "rlhf: there is no run to resume in it"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(project, arguments, message):
    assert refused("run", "rlhf.json", *arguments, cwd=project) == message


@pytest.mark.skipif(os.name != "posix", reason="needs pseudo-terminals")
def test_on_a_terminal_there_is_a_table_of_samples(trained):
    import pty

    main, terminal = pty.openpty()
    subprocess.run(["stty", "cols", "80", "rows", "30"], stdin=terminal, check=True)
    command = [*COMMAND, "run", "rlhf.json", "--output-dir", "tty"]
    process = subprocess.Popen(command, cwd=trained[0], env=ENVIRONMENT | {"TERM": "xterm"},
                               stdin=terminal, stdout=terminal, stderr=terminal)  # fmt: skip
    os.close(terminal)
    found = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        found += part
        if not part:
            break
    os.close(main)
    assert process.wait(timeout=60) == 0
    shown = found.decode()
    assert "samples of step 2" in shown
    assert "response" in shown
    assert "step 2/2" in shown
    assert shown.rstrip().endswith("next: loopos generate tty --prompt 'a prompt'")
