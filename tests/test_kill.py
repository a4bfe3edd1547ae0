"""A run that is killed, at any moment and again and again, ends as the one that never was.

This file is also the program that forks the runs: a fork of a process that has imported all a run
needs takes a tenth of a second where ``loopos run`` takes two.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

from loopos.config import load_config
from loopos.errors import CheckpointError
from loopos.files import locked_directory
from loopos.runner import run
from loopos.training.checkpoint import find_checkpoint
from loopos.training.loop import Interrupted

CONFIG = {
    "model": {"d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 16, "vocab_size": 270,
              "max_seq_len": 32, "dropout": 0.1},
    "computation": {"method": "fine_tuning", "num_threads": 1},
    "training": {"learning_rate": 0.003, "batch_size": 4, "num_epochs": 3, "save_steps": 2,
                 "eval_steps": 3, "num_workers": 0},
    "data": {"training_data": "t.csv", "validation_fraction": 0.2, "output_dir": "out"},
}  # fmt: skip
WORDS = (("dull", "cold", "silly"), ("warm", "clever", "fine"))
TIMED = ("time_s", "tokens_per_s")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("mode", "kills"), [("clock", 100), ("calls", 40)])
def test_killed_runs_end_with_the_bytes_of_the_one_that_never_was(tmp_path, mode, kills):
    """By the clock: at random instants. By calls: before a random change of the file system."""
    single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), mode, str(kills)],
        env=os.environ | single | {"TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["different"] == []
    assert found["kills"] == kills
    # Not only before the first checkpoint, nor only after it; that moment is short by the clock.
    assert found["states"].keys() >= {"checkpoint"} | ({"begun"} if mode == "calls" else set())
    assert found["states"]["checkpoint"] >= kills // 8


def loopos(directory, *arguments, **keywords):
    command = [sys.executable, "-m", "loopos", "run", "run.json", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, **keywords)


def last_line(done, code):
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


def test_a_second_run_into_a_directory_is_refused_and_the_first_goes_on(tmp_path):
    prepare(tmp_path / "a")
    once = ("--set", "training.num_epochs=400", "--set", "training.eval_steps=50")
    command = [sys.executable, "-m", "loopos", "run", "run.json", *once]
    first = subprocess.Popen(command, cwd=tmp_path / "a", stderr=subprocess.PIPE)
    try:
        metrics, deadline = tmp_path / "a/out/metrics.jsonl", time.monotonic() + 60
        while not metrics.exists() or not metrics.read_bytes():
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        before = outputs_raw(tmp_path / "a/out")
        for arguments in ((), ("--resume",)):
            assert last_line(loopos(tmp_path / "a", *once, *arguments), 2) == (
                "error: out: another run is going in this directory; wait for its end, or choose "
                "another directory"
            )
            assert outputs_raw(tmp_path / "a/out") == before
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    with locked_directory(tmp_path / "a/out"):  # whoever comes now is let in
        assert (tmp_path / "a/out/.lock").exists()
    assert not (tmp_path / "a/out/.lock").exists()


def outputs_raw(out):
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_full_disk_in_a_save_is_one_sentence_and_the_checkpoint_before_is_whole(tmp_path):
    resource = pytest.importorskip("resource")
    wide = ("--set", "model.d_model=32")
    whole, short = prepare(tmp_path / "whole"), prepare(tmp_path / "short")
    assert loopos(whole, *wide).returncode == 0
    assert loopos(short, *wide, "--set", "training.max_steps=6").returncode == 0
    before = outputs_raw(short / "out/checkpoints")

    def little_space():  # enough for all files but for the optimizer's
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    told = last_line(loopos(short, *wide, "--resume", preexec_fn=little_space), 2)
    assert told.startswith("error: out/checkpoints/step-0000000")
    assert ": cannot be written (" in told
    assert outputs_raw(short / "out/checkpoints") == before
    assert loopos(short, *wide, "--resume").returncode == 0
    assert outputs(short) == outputs(whole)


def test_damaged_checkpoints_are_passed_over_and_without_a_whole_one_nothing_runs(tmp_path):
    whole, harmed = prepare(tmp_path / "whole"), prepare(tmp_path / "harmed")
    # At this rate the last evaluation is not the best one, so there are two checkpoints.
    rising = ("--set", "training.learning_rate=0.3")
    assert loopos(whole, *rising).returncode == 0
    shutil.copytree(whole / "out", harmed / "out")
    best, last = sorted((harmed / "out/checkpoints").iterdir())
    raw = bytearray((last / "model.safetensors").read_bytes())
    raw[len(raw) // 3] ^= 4
    (last / "model.safetensors").write_bytes(raw)
    again = loopos(harmed, *rising, "--resume")
    assert again.returncode == 0
    name = f"out/checkpoints/{last.name}/model.safetensors"
    assert f"skipped a damaged checkpoint: {name} does not match its checksum" in again.stderr
    assert outputs(harmed) == outputs(whole)
    for path in (best, last):
        (path / "state.json").write_bytes((path / "state.json").read_bytes()[:-9])
    before = outputs_raw(harmed / "out")
    assert last_line(loopos(harmed, *rising, "--resume"), 2) == (
        f"error: no checkpoint in out/checkpoints is whole: out/checkpoints/{last.name}/state.json "
        "does not match its checksum"
    )
    assert outputs_raw(harmed / "out") == before


def test_an_option_that_a_checkpoint_does_not_know_has_its_default(tmp_path, monkeypatch):
    monkeypatch.chdir(prepare(tmp_path / "a"))
    asked = []
    with pytest.raises(Interrupted):
        run(load_config("run.json"), stop=lambda: asked.append(1) or len(asked) == 4)
    path = find_checkpoint("out/checkpoints")
    state = json.loads((path / "state.json").read_text())
    for options in (state["options"], state["run_config"]["training"]):
        del options["betas"], options["label_smoothing"]  # as an older version would write it
    del state["run_config"]["data"]["text_field"], state["run_config"]["transformer"]["norm"]
    raw = json.dumps(state).encode()
    (path / "state.json").write_bytes(raw)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as caught:
        run(load_config("run.json", ["training.label_smoothing=0.1"]), resume=True)
    assert str(caught.value) == (
        "--set training.label_smoothing: 0.1, but the run to be continued (out) has 0.0"
    )
    assert run(load_config("run.json"), resume=True).result.steps == 15
    run(load_config("run.json", ["data.output_dir=whole"]))
    assert (
        Path("out/model/model.safetensors").read_bytes()
        == Path("whole/model/model.safetensors").read_bytes()
    )


# -- the program -----------------------------------------------------------------------------------


def prepare(directory):
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps(CONFIG, indent=1))
    rng = random.Random(5)
    rows = [f"{' '.join(rng.choices(WORDS[i % 2], k=3 + i % 4))} {i},{i % 2}" for i in range(24)]
    (directory / "t.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return directory


def fork_run(directory, *arguments, call=None):
    """Start ``loopos run`` in a fork; at the change of the file system `call` it kills itself."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(directory)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if call is not None:
            die_before(call)
        from loopos import cli

        sys.argv = ["loopos", "run", "run.json", *arguments]
        code = cli._run_app()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def die_before(call):
    """Kill this process before a change of the output directory, the `call`-th of them."""
    left = [call]
    here = os.getcwd()

    def hook(event, arguments):
        path = str(arguments[0]) if arguments else ""
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (1 | 2)
        )
        if changes and ("out" in path.replace(here, "").split("/") or event == "os.rmdir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def result(child, until=None):
    """Return the exit code of a run; at the instant `until` it is killed."""
    while until is not None:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        left = until - time.perf_counter()
        if left <= 0:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(min(left, 0.002))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outputs(directory):
    """Return all that a run left, but for the times in its metrics."""
    found = {}
    for path in sorted((directory / "out").rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_dir():
            found[name] = "directory"
        elif path.name == "metrics.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in r.items() if k not in TIMED} for r in records]
        else:  # a run's configuration says where its data lie
            found[name] = path.read_bytes().replace(os.fsencode(directory), b"")
    return found


def state(directory):
    out = directory / "out"
    if (out / "model").exists():
        return "model"
    if any(out.glob("checkpoints/step-*/manifest.json")):
        return "checkpoint"
    return "begun" if (out / "metrics.jsonl").exists() else "nothing"


class Runs:
    """Runs that are killed and go on, until there have been enough kills."""

    def __init__(self, root, mode, kills):
        self.root, self.mode, self.kills = root, mode, kills
        self.rng = random.Random(20240607)
        self.states, self.different, self.done = Counter(), [], 0
        whole = prepare(root / "whole")
        for _ in range(2):  # the second is timed: what the first reads is in memory then
            shutil.rmtree(whole / "out", ignore_errors=True)
            began = time.perf_counter()
            code = result(fork_run(whole))
            assert code == 0, (whole / "log").read_text()
            self.length = time.perf_counter() - began
        self.whole = outputs(whole)

    def attempt(self, directory, arguments, spared):
        """Run, to be killed at a random moment unless `spared`; return the exit code."""
        if spared or self.done == self.kills:
            return result(fork_run(directory, *arguments))
        if self.mode == "calls":
            return result(fork_run(directory, *arguments, call=self.rng.randrange(1, 170)))
        until = time.perf_counter() + self.rng.uniform(0, self.length)
        return result(fork_run(directory, *arguments), until)

    def one(self, directory):
        """Begin a run and bring it to its end, through up to so many kills."""
        arguments, last = [], self.done + self.rng.randrange(1, 7)
        log = directory / "log"
        while True:
            code = self.attempt(directory, arguments, self.done >= last)
            if code == 0:
                break
            if code == -signal.SIGKILL:
                self.done += 1
                self.states[state(directory)] += 1
                arguments = ["--resume"]
            else:
                # Killed before anything was begun: then there is nothing to continue. One that was
                # killed while it said so may have left a part of the line.
                said = log.read_text().splitlines()[-1]
                assert said.endswith("error: out: there is no run to resume in it"), log.read_text()
                assert (code, arguments) == (2, ["--resume"])
                assert set(os.listdir(directory)) - {"out"} == {"run.json", "t.csv", "log"}
                arguments = []
        found = outputs(directory)
        for name in {*found, *self.whole}:
            if found.get(name) != self.whole.get(name):
                self.different.append(f"{directory.name}/{name}")

    def all(self):
        count = 0
        while self.done < self.kills:
            directory = prepare(self.root / f"run-{count}")
            self.one(directory)
            if not self.different:
                shutil.rmtree(directory)
            count += 1
        return {"kills": self.done, "runs": count, "states": self.states,
                "different": self.different, "seconds": self.length}  # fmt: skip


#: All that a run imports.
NEEDED = ("filelock", "numpy.random", "safetensors.numpy", "scipy.special", "threadpoolctl",
          "tokenizers", "loopos.cli", "loopos.config", "loopos.methods.fine_tuning",
          "loopos.methods.pretraining", "loopos.runner")  # fmt: skip


def main():
    root, mode, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    for name in NEEDED:
        importlib.import_module(name)
    from loopos import cli

    sys.argv = ["loopos", "run", "no-such-file.json"]  # the command line imports as it parses
    with contextlib.redirect_stderr(io.StringIO()):
        assert cli._run_app() == 2
    print(json.dumps(Runs(root, mode, kills).all()))


if __name__ == "__main__":
    main()
