"""The command line as people use it: in processes of its own, by what they see and what is left."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loopos import __main__ as started
from loopos import cli
from loopos.config import shipped_configs
from loopos.display import show_summary
from loopos.runner import Summary
from loopos.training.loop import TrainResult
from loopos.version import __version__

LOOPOS = str(Path(sys.executable).with_name("loopos"))
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("LOOPOS", "COLUMNS"))} | {
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
CONFIG = {
    "model": {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 300,
              "max_seq_len": 64},
    "computation": {"method": "fine_tuning", "description": "[bold]tiny[/]"},
    "training": {"learning_rate": 0.01, "batch_size": 8, "num_epochs": 3},
    "data": {"training_data": "t.csv", "output_dir": "out"},
}  # fmt: skip
#: Enough steps to be interrupted in their midst; evaluated at the end only.
LONG = [f"--set=training.{option}" for option in
        ("num_epochs=30", "eval_steps=100000", "save_steps=60", "batch_size=4")] + [
    "--set=model.dropout=0.1"]  # fmt: skip


def loopos(*arguments, cwd, code=0, stdin=None, **environment):
    """Run a command; assert its exit code, and that no traceback is to be seen."""
    done = subprocess.run(
        [LOOPOS, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT | environment,
        input=stdin if isinstance(stdin, bytes) else (stdin or "").encode(),
        capture_output=True, timeout=120,
    )  # fmt: skip
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, out + err
    assert "Traceback" not in out + err
    assert "\x1b" not in out + err  # neither is a terminal
    return out, err


def refused(*arguments, cwd, **keywords):
    """Return the one sentence with which a command is refused."""
    out, err = loopos(*arguments, cwd=cwd, code=2, **keywords)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def write_project(directory):
    rng = np.random.default_rng(0)
    words = [["dull", "cold", "silly", "[/]"], ["warm", "clever", "fine", "[bold]good"]]
    common = ["电影", "😀", "مرحبا", "film", "a"]
    with (directory / "t.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(48):
            text = [*rng.choice(words[i % 2], 3), *rng.choice(common, 1 + i % 4), str(i)]
            writer.writerow([" ".join(text), ("neg", "[red]pos")[i % 2]])
    (directory / "run.json").write_text(json.dumps(CONFIG, indent=1))


@pytest.fixture
def project(tmp_path):
    write_project(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a directory with a finished run in ``out``, and what the command printed."""
    directory = tmp_path_factory.mktemp("trained")
    write_project(directory)
    return directory, *loopos("run", "run.json", cwd=directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the weights of a long run that nobody interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    write_project(directory)
    loopos("run", "run.json", *LONG, cwd=directory)
    return weights(directory)


def weights(directory):
    return {p.name: p.read_bytes() for p in (directory / "out/model").glob("*.safetensors")}


def snapshot(directory):
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# -- run, predict --------------------------------------------------------------------------------


def test_a_run_says_what_it_does_and_leaves_what_it_says(trained):
    directory, out, err = trained
    lines = out.splitlines()
    assert lines[:2] == ["data", "  rows           44 training, 4 validation"]
    start = lines.index("run")
    assert lines[start + 1] == "  18 optimizer steps"
    head = 2 * 16 + 2  # two classes on a width of 16
    model = int(lines[start - 1].split()[0].replace(",", ""))
    assert lines[start - 2 : start] == ["model", f"  {model:,} parameters"]
    assert lines[start + 2] == (
        f"  {model + head:,} parameters are trained: the model's and {head} of a head or critic"
    )
    assert lines[start + 3].startswith("  backend ")
    assert lines[start + 3].endswith(" (1 thread), seed 0")
    assert lines[start + 4 : start + 6] == ["  output in out", "18 steps, finished"]
    assert "  true \\ predicted" in lines
    assert any(line.split()[:1] == ["[red]pos"] for line in lines)
    assert lines[-2:] == ["saved in out", "next: loopos predict out 'a text'"]
    assert [line.split(":")[0] for line in err.splitlines()] == [
        f"step {step}/18  evaluation" for step in (6, 12, 18)
    ]
    assert sorted(p.name for p in (directory / "out").iterdir()) == [
        "checkpoints", "config.json", "data_report.json", "evaluation.json", "metrics.jsonl",
        "model", "tokenizer",
    ]  # fmt: skip


def test_the_printed_command_works(trained):
    directory, out, _ = trained
    command = shlex.split(out.splitlines()[-1].removeprefix("next: "))
    assert command[0] == "loopos"
    out, err = loopos(*command[1:], cwd=directory)
    assert out.endswith("%  a text\n")
    assert err == ""


def test_predictions_in_every_form(trained, tmp_path):
    directory, _, _ = trained
    texts = ["warm [bold]fine[/] [/] film", "cold 电影 😀 مرحبا"]
    out, _ = loopos("predict", "out", *texts, cwd=directory)
    assert [line.split("%  ")[1] for line in out.splitlines()] == texts
    labels = [line.split("  ")[0].strip() for line in out.splitlines()]

    as_json, _ = loopos("predict", "out", *texts, "--json", cwd=directory)
    rows = [json.loads(line) for line in as_json.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert [row["label"] for row in rows] == labels
    for row in rows:
        assert list(row["probabilities"]) == ["[red]pos", "neg"]
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert max(row["probabilities"], key=row["probabilities"].get) == row["label"]

    # A line for each line of standard input, also for those with nothing in them.
    blank = {"label": None, "probabilities": None}
    piped, _ = loopos("predict", "out/model", "--json", cwd=directory,
                      stdin="\ufeff" + texts[0] + "\r\n\n" + texts[1] + "\n \n")  # fmt: skip
    assert [json.loads(line) for line in piped.splitlines()] == [
        rows[0], {"text": "", **blank}, rows[1], {"text": " ", **blank},
    ]  # fmt: skip
    shown, _ = loopos("predict", "out", cwd=directory, stdin="\n".join([texts[0], "", texts[1]]))
    first, second = loopos("predict", "out", *texts, cwd=directory)[0].splitlines()
    assert shown == f"{first}\n\n{second}\n"
    kept = tmp_path / "kept.jsonl"
    out, _ = loopos("predict", "out", "--output", kept, cwd=directory,
                    stdin="\n".join(["", *texts]))  # fmt: skip
    assert out == f"2 predictions in {kept}\n"
    assert kept.read_text(encoding="utf-8").splitlines()[1:] == as_json.splitlines()

    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"body": t}) + "\n" for t in [texts[0], " ", texts[1]]))
    target = tmp_path / "out.jsonl"
    out, err = loopos("predict", "out", "--input", file, "--text-field", "body",
                      "--output", target, cwd=directory)  # fmt: skip
    assert out == f"2 predictions in {target}\n"
    assert err == f"left out, as there is no text: {file}:2\n"
    assert target.read_text(encoding="utf-8") == as_json


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["nowhere", "x"], None, "nowhere: no such directory"),
        (["out", "x", "--input", "t.csv"], None, "give either texts or --input, not both"),
        (["out"], "\n \n", "there is no text to classify"),
        (["out"], b"fine\n\xff\n", "standard input:2: not UTF-8 text (byte 0xff)"),
        (["out", ""], None, "text 0: there is nothing in it"),
        (["out", "--input", "t.csv", "--text-field", "txt"], None,
         "t.csv:2: no field 'txt'; did you mean 'text'? (found: text, label)"),
        (["out", "--input", "tt.csv"], None, "tt.csv: no such file; did you mean 't.csv'?"),
        (["out", "x", "--output", "t.csv/x"], None, "t.csv/x: cannot be written (File exists)"),
    ],
)  # fmt: skip
def test_what_predict_refuses(trained, arguments, stdin, message):
    directory, _, _ = trained
    assert refused("predict", *arguments, cwd=directory, stdin=stdin) == message


def test_predict_tells_an_unfinished_run(trained, tmp_path):
    directory, _, _ = trained
    shutil.copytree(directory / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    assert refused("predict", "out", "x", cwd=tmp_path) == (
        "out: this run has not finished, so there is no model in it; "
        "continue it with 'loopos run CONFIG --resume'"
    )


# -- validate, configs, info ---------------------------------------------------------------------


def test_validate_says_what_a_run_would_do_and_writes_nothing(project):
    before = snapshot(project)
    out, err = loopos("validate", "run.json", "--set", "training.num_epochs=5", cwd=project)
    lines = out.splitlines()
    assert lines[lines.index("run") + 1] == "  6 optimizer steps an epoch, 30 in all"
    (parameters,) = lines[lines.index("model") + 1 : lines.index("run")]
    trained = lines[lines.index("run") + 2]
    assert parameters.split()[1:] == ["parameters"]
    # The head comes to the body, whose own language-model head is its table.
    assert int(trained.split()[0].replace(",", "")) == (
        int(parameters.split()[0].replace(",", "")) + 2 * 16 + 2
    )
    assert lines[-4] == "  output in out"
    assert re.fullmatch(r"  memory 0\.\d\d GiB at the most \(\d+\.\d GiB are free\)", lines[-3])
    time = r"[\d.]+ m?s"
    parts = rf"{time} a step, {time} an evaluation, {time} a checkpoint"
    assert re.fullmatch(rf"  time {time} \({parts}\)", lines[-2])
    assert lines[-1] == "run.json: fine"
    assert err == ""
    assert snapshot(project) == before
    quick, _ = loopos("validate", "run.json", "--no-measure", cwd=project)
    assert quick.splitlines()[-2:] == ["  output in out", "run.json: fine"]


def test_configs_are_listed_shown_and_copied(tmp_path):
    out, _ = loopos("configs", cwd=tmp_path)
    assert [line.split()[0] for line in out.splitlines()] == list(shipped_configs())
    out, _ = loopos("configs", "--show", "demo", cwd=tmp_path)
    assert out == shipped_configs()["demo"].read_text()
    out, _ = loopos("configs", "--copy", "pretraining", "my.json", cwd=tmp_path)
    assert out == "copied to my.json\n"
    assert (tmp_path / "my.json").read_text() == shipped_configs()["pretraining"].read_text()
    assert (
        refused("configs", "--copy", "demo", "my.json", cwd=tmp_path) == "my.json: exists already"
    )
    assert refused("configs", "--show", "dmo", cwd=tmp_path) == (
        "no shipped configuration 'dmo'; did you mean 'demo'?"
    )


def test_info(tmp_path):
    out, _ = loopos("info", "--json", cwd=tmp_path, LOOPOS_BACKEND="numpy")
    facts = json.loads(out)
    assert (facts["loopos"], facts["backend"], facts["numpy"]) == (
        __version__, "numpy", np.__version__,
    )  # fmt: skip
    assert facts["cpus"] == 1
    assert set(facts["backends"]["numpy"]) >= {"name", "isa", "threads", "native", "inherited"}
    out, _ = loopos("info", cwd=tmp_path, LOOPOS_BACKEND="")
    assert out.splitlines()[0].split() == ["loopos", __version__]
    assert any("(in force)" in line for line in out.splitlines())
    assert refused("info", cwd=tmp_path, LOOPOS_BACKEND="nunpy").startswith(
        "LOOPOS_BACKEND: unknown backend 'nunpy'; did you mean 'numpy'?"
    )


def test_version_and_help(tmp_path):
    assert loopos("--version", cwd=tmp_path) == (f"loopos {__version__}\n", "")
    out, _ = loopos(cwd=tmp_path)
    assert out == loopos("--help", cwd=tmp_path)[0] == loopos("-h", cwd=tmp_path)[0]
    assert "Exit codes: 0" in out
    for name in ("run", "validate", "configs", "info", "predict", "evaluate", "merge",
                 "tokenizer", "demo"):  # fmt: skip
        assert f"\n  {name} " in out
    assert "..." not in out.partition("Commands:")[2]  # every summary fits its line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["rnu"], "No such command 'rnu'"), (["run"], "Missing argument 'CONFIG'"),
     (["run", "x.json", "--bogus"], "No such option: --bogus")],
)  # fmt: skip
def test_wrong_usage(tmp_path, arguments, message):
    out, err = loopos(*arguments, cwd=tmp_path, code=2)
    assert out == ""
    usage, error = err.splitlines()
    assert usage.startswith("Usage: loopos")
    assert error.startswith(f"error: {message}")


# -- bad input -----------------------------------------------------------------------------------


def damaged(project, *, drop=None, nan=False, shape=False):
    """Make a model directory with one fault in it; return the file."""
    from loopos.data.tokenizer import train_bpe
    from loopos.models.transformer import Transformer, TransformerConfig

    base = project / "base"
    Transformer(TransformerConfig(16, 2, 1, 32, 300)).save(base, train_bpe(["text"], 270))
    tensors = dict(load_file(base / "model.safetensors"))
    name = next(n for n in tensors if n.endswith("ln_1.weight"))
    if drop:
        del tensors[name]
    if nan:
        tensors[name][3] = np.nan
    if shape:
        tensors[name] = tensors[name][:8].copy()
    save_file(tensors, base / "model.safetensors")
    config = CONFIG | {"model": {}}
    (project / "run.json").write_text(json.dumps(config, indent=1))
    return name


PRETRAINED = "--set=data.pretrained_weights=base"


def test_bad_data_is_refused_with_file_and_line(project):
    good = [{"text": f"text {i}", "label": i % 2} for i in range(10)]
    lines = [json.dumps(row) for row in good]
    cases = {
        "truncated": ([*lines[:6], lines[6][:9]], "bad.jsonl:7: "),
        "encoding": ([*lines[:4], '{"text": "caf\udce9", "label": 1}'],
                     "bad.jsonl:5: not UTF-8 text (byte 0xe9)"),
        "label": ([*lines, '{"text": "x", "label": 2}'],
                  "bad.jsonl:11: expected 'label' from 0 to 1, found 2"),
        "no label": ([*lines, '{"text": "x"}'], "bad.jsonl:11: no field 'label' (found: text)"),
        "no text": ([*lines, '{"text": 3, "label": 1}'],
                    "bad.jsonl:11: expected 'text' to be text, found 3"),
        "empty": ([], "bad.jsonl: there is no row in it"),
        "one class": ([json.dumps(row | {"label": 1}) for row in good],
                      "bad.jsonl:1: every row has the 'label' 1, expected two classes at least"),
    }  # fmt: skip
    for name, (content, message) in cases.items():
        raw = "\n".join(content).encode("utf-8", "surrogateescape")
        (project / "bad.jsonl").write_bytes(raw)
        sentence = refused("run", "run.json", "--set", "data.training_data=bad.jsonl",
                           "--set", "model.num_classes=2", cwd=project)  # fmt: skip
        assert sentence.startswith(message), (name, sentence)
        if not message.endswith(": "):
            assert sentence == message
        assert not (project / "out").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"drop": True}, "base: tensor '{}' is missing"),
     ({"nan": True}, "base/model.safetensors: tensor '{}' is nan at [3]"),
     ({"shape": True}, "base/model.safetensors: tensor '{}' has shape [8], expected [16]")],
)  # fmt: skip
def test_bad_weights_are_refused_with_file_and_tensor(project, fault, message):
    name = damaged(project, **fault)
    for command in ("run", "validate"):
        assert refused(command, "run.json", PRETRAINED, cwd=project).startswith(
            message.format(name)
        )
    assert not (project / "out").exists()


def test_bad_configurations_are_refused_with_file_and_line(project):
    text = (project / "run.json").read_text()
    (project / "run.json").write_text(text.replace("learning_rate", "learning_rte"))
    line = 1 + next(i for i, t in enumerate(text.splitlines()) if "learning_rate" in t)
    assert refused("run", "run.json", cwd=project) == (
        f"run.json:{line}: training.learning_rte: unknown key; did you mean 'learning_rate'?"
    )
    (project / "run.json").write_text(text[:40])
    assert refused("run", "run.json", cwd=project).startswith("run.json:4: not valid JSON: ")
    (project / "run.json").write_text(text)
    assert refused("run", "rum.json", cwd=project).startswith(
        "rum.json: no such configuration; did you mean 'run.json'? (shipped: "
    )
    out, err = loopos("run", "run.json", "--set", "training.a=1", "--set", "model.b=1",
                      cwd=project, code=2)  # fmt: skip
    assert err == "error: --set model.b: unknown key\nerror: --set training.a: unknown key\n"
    assert out == ""


def test_an_output_directory_that_is_taken_or_cannot_be(trained):
    directory, _, _ = trained
    before = snapshot(directory)
    assert refused("run", "run.json", cwd=directory) == (
        "out: already holds a run (config.json); choose another directory (--output-dir)"
    )
    assert refused("run", "run.json", "--output-dir", "t.csv/out", cwd=directory) == (
        "t.csv/out: cannot be written (Not a directory)"
    )
    assert refused("run", "run.json", "--output-dir", "new", "--resume", cwd=directory) == (
        "new: there is no run to resume in it"
    )
    assert refused("run", "run.json", "--resume", "--set", "training.batch_size=7",
                   cwd=directory) == (
        "--set training.batch_size: 7, but the run to be continued (out) has 8"
    )  # fmt: skip
    assert snapshot(directory) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_directory(project):
    (project / "locked").mkdir()
    (project / "locked").chmod(0o500)
    assert refused("run", "run.json", "--output-dir", "locked/out", cwd=project) == (
        "locked/out: cannot be written (Permission denied)"
    )


def test_a_run_that_diverges_is_stopped_with_exit_code_1(project):
    _, err = loopos("run", "run.json", "--set", "training.learning_rate=1e30", cwd=project, code=1)
    (line,) = err.splitlines()
    assert line.startswith("error: step 2: loss is ")
    assert line.endswith("; the state before it is in out/checkpoints/step-00000001")


def test_pretraining_ends_with_what_to_do_next(project):
    out, _ = loopos("run", "run.json", "--set", "computation.mode=pretraining", "--set",
                    "computation.method=autoregressive", "--set", "training.max_steps=2",
                    cwd=project)  # fmt: skip
    assert "  perplexity " in out
    assert out.endswith("next: fine-tune it with --set data.pretrained_weights=out/model\n")
    assert refused("predict", "out", "x", cwd=project) == (
        "out/model: is no classifier (classifier.json is missing); "
        "fine-tune it first, as data.pretrained_weights"
    )


def test_the_summary_says_which_weights_were_kept(project):
    swapped = (project / "t.csv").read_text(encoding="utf-8").replace("pos", "tmp")
    swapped = swapped.replace("neg", "[red]pos").replace("[red]tmp", "neg")
    (project / "v.csv").write_text(swapped, encoding="utf-8")  # the better, the worse
    worse = ("data.validation_data=v.csv", "training.max_steps=9", "training.eval_steps=1")
    options = [part for option in worse for part in ("--set", option)]
    out, _ = loopos("run", "run.json", *options, cwd=project)
    records = map(json.loads, (project / "out/metrics.jsonl").read_text().splitlines())
    losses = [record["eval"]["loss"] for record in records if "eval" in record]
    best = losses.index(min(losses)) + 1
    assert best < 9 == len(losses)
    assert f"9 steps, finished; kept is step {best}, the best evaluation" in out.splitlines()


# -- interruptions -------------------------------------------------------------------------------


def start(directory, until):
    """Begin the long run; return its process once `until(output directory)` holds."""
    process = subprocess.Popen(
        [LOOPOS, "run", "run.json", *LONG], cwd=directory, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not until(directory / "out"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def steps_done(directory, count):
    file = directory / "metrics.jsonl"
    return file.exists() and file.read_bytes().count(b"\n") >= count


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(project, whole, number):
    process = start(project, lambda out: steps_done(out, 5))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    asked, told, command = err.splitlines()
    assert asked == "stopping after this step (again to stop now)"
    step = int(told.removeprefix("interrupted after step ").partition(",")[0])
    assert 5 <= step < 330
    assert told == f"interrupted after step {step}, saved in out/checkpoints/step-{step:08d}"
    assert not (project / "out/model").exists()
    parts = shlex.split(command.removeprefix("continue with: "))
    assert parts[0] == "loopos"
    resumed, _ = loopos(*parts[1:], cwd=project)
    assert f"  330 optimizer steps, {step:,} of them done before\n" in resumed
    assert weights(project) == whole


@pytest.fixture
def rehearsing(project):
    """Begin to validate; return the process and that of its rehearsal, which is halted midway."""
    if sys.platform != "linux":
        pytest.skip("looks for processes in /proc")
    process = subprocess.Popen(
        [LOOPOS, "validate", "run.json", *LONG], cwd=project, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(project.glob(".loopos-rehearsal-*/run/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGSTOP)  # or it might be done before it is asked to stop
    yield process, int(child)
    for left in (process.pid, int(child)):
        if is_running(left):
            os.kill(left, signal.SIGKILL)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_rehearsal_and_clears_it_away(project, rehearsing, number):
    process, child = rehearsing
    if number == signal.SIGINT:  # Ctrl-C goes to all processes of a terminal
        os.killpg(process.pid, number)
        with suppress(ProcessLookupError):  # it has been ended already
            os.kill(child, signal.SIGCONT)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "error: interrupted\n")
    assert not is_running(child)
    assert sorted(p.name for p in project.iterdir()) == ["run.json", "t.csv"]


def test_a_rehearsal_ends_with_whoever_asked_for_it(project, rehearsing):
    process, child = rehearsing
    process.kill()
    os.kill(child, signal.SIGCONT)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sorted(p.name for p in project.iterdir()) == ["run.json", "t.csv"]


def test_a_rehearsal_that_is_interrupted_alone_is_one_sentence(project, rehearsing):
    process, child = rehearsing
    os.kill(child, signal.SIGINT)
    os.kill(child, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "error: run.json: the rehearsal of the run failed\n")
    assert sorted(p.name for p in project.iterdir()) == ["run.json", "t.csv"]


def test_an_interruption_while_importing_is_one_sentence(monkeypatch, capsys):
    class Slow:
        @property
        def main(self):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "loopos.cli", Slow())
    with pytest.raises(SystemExit) as left:
        started.main()
    assert left.value.code == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")


def test_the_installed_command_is_the_one_that_can_be_interrupted():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert tomllib.loads(text)["project"]["scripts"] == {"loopos": "loopos.__main__:main"}


@pytest.mark.parametrize("command", ["run", "validate", "preview"])
def test_an_interruption_before_the_first_step_is_said(monkeypatch, capsys, command):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("loopos.config.load_config", interrupted)
    monkeypatch.setattr(sys, "argv", ["loopos", command, "fine_tuning"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")


def test_an_output_directory_without_a_name_is_refused(project):
    for command in ("run", "validate"):
        assert refused(command, "run.json", "--output-dir", "", cwd=project) == (
            "--output-dir: expected a directory, found nothing"
        )
    assert sorted(p.name for p in project.iterdir()) == ["run.json", "t.csv"]


def test_an_output_directory_in_the_home(project):
    home = str(project / "home")
    out, _ = loopos("validate", "run.json", "--no-measure", "--output-dir", "~/a", cwd=project,
                    HOME=home)  # fmt: skip
    assert f"  output in {home}/a" in out.splitlines()
    loopos("run", "run.json", "--output-dir", "~/a", cwd=project, HOME=home)
    assert (project / "home/a/model").is_dir()
    assert not (project / "~").exists()


def test_predict_names_a_directory_of_something_else(tmp_path):
    (tmp_path / "photos").mkdir()
    assert refused("predict", "photos", "x", cwd=tmp_path) == (
        "photos: is neither a run directory nor a saved classifier"
    )


@pytest.mark.parametrize(
    ("method", "files", "expected"),
    [
        ("dpo", {}, "loopos generate 'a run' --prompt 'a prompt'"),
        ("sft", {}, "loopos generate 'a run' --prompt 'a prompt'"),
        ("sft", {"tokenizer_config.json": '{"chat_template": "{{ x }}"}'}, "loopos chat 'a run'"),
        ("chain_of_thought",
         {"reasoning.json": "{}", "tokenizer_config.json": '{"chat_template": "{{ x }}"}'},
         "loopos generate 'a run' --prompt 'a problem'"),
        ("autoregressive", {},
         "fine-tune it with --set 'data.pretrained_weights=a run/model'"),
        ("reward_model", {"reward_model.json": "{}"}, "loopos evaluate 'a run' pairs.jsonl"),
    ],
)  # fmt: skip
def test_what_to_do_next_fits_the_method(tmp_path, monkeypatch, capsys, method, files, expected):
    monkeypatch.chdir(tmp_path)
    run = Path("a run")
    (run / "model").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"computation": {"method": method}}))
    for name, text in files.items():
        (run / "model" / name).write_text(text)
    result = TrainResult(1, "finished", [], [], None, None, None)
    show_summary(Summary(result, {}, run))
    assert capsys.readouterr().out == f"1 step, finished\nsaved in a run\nnext: {expected}\n"


def test_a_killed_run_goes_on_from_its_last_checkpoint(project, whole):
    process = start(project, lambda out: any(out.glob("checkpoints/step-*/manifest.json")))
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    loopos("run", "run.json", *LONG, "--resume", cwd=project)
    assert weights(project) == whole
    steps = [json.loads(line) for line in (project / "out/metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "eval" not in s] == list(range(1, 331))
    assert not [p for p in (project / "out").rglob("*") if ".tmp" in p.name]


def test_a_run_killed_before_its_first_checkpoint_is_started_over(project, whole):
    process = start(project, lambda out: steps_done(out, 1))
    process.kill()
    process.communicate(timeout=60)
    shutil.rmtree(project / "out/checkpoints", ignore_errors=True)
    assert refused("run", "run.json", *LONG, cwd=project) == (
        "out: holds a run that ended before its first checkpoint; start it over with --resume, "
        "or choose another directory (--output-dir)"
    )
    loopos("run", "run.json", *LONG, "--resume", cwd=project)
    assert weights(project) == whole


def test_signals_before_the_first_step_and_second_ones_stop_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with cli._stop_on_signals() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert not stop()  # the first step is done
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err == "stopping after this step (again to stop now)\n"


# -- terminals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["loopos configs", "loopos --help", "loopos validate run.json"])
def test_a_reader_that_leaves_early_is_no_error(project, command):
    line = f"set -o pipefail; {command.replace('loopos', shlex.quote(LOOPOS))} | head -c 1"
    done = subprocess.run(["bash", "-c", line], cwd=project, env=ENVIRONMENT, capture_output=True)
    assert done.stderr == b""
    assert len(done.stdout) == 1
    assert done.returncode in (0, 1)


def test_texts_reach_terminals_of_other_encodings(trained):
    directory, _, _ = trained
    text = "fine 😀 مرحبا"
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    out, _ = loopos("predict", "out", text, cwd=directory, **ascii_only)
    assert out.split("%  ")[1] == "fine \\U0001f600 \\u0645\\u0631\\u062d\\u0628\\u0627\n"
    out, _ = loopos("predict", "out", text, "--json", cwd=directory, **ascii_only)
    assert out.isascii()
    expected, _ = loopos("predict", "out", text, "--json", cwd=directory)
    assert json.loads(out) == json.loads(expected)
    c_locale = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments, stdin in (([text], None), ([], text)):
        out, _ = loopos("predict", "out", *arguments, "--json", cwd=directory, stdin=stdin,
                        **c_locale)  # fmt: skip
        assert json.loads(out) == json.loads(expected)
    out, _ = loopos("run", "run.json", "--output-dir", "locale", cwd=directory, **c_locale)
    assert out.endswith("next: loopos predict locale 'a text'\n")


def test_control_characters_are_shown_and_not_obeyed(trained):
    directory, _, _ = trained
    out, _ = loopos("predict", "out", "red \x1b[31m and\x07", cwd=directory)
    assert out.split("%  ")[1] == "red \\x1b[31m and\\x07\n"


def on_terminal(*arguments, cwd, **environment):
    """Run a command on a terminal of 60 columns; return what the terminal got."""
    import pty

    main, terminal = pty.openpty()
    subprocess.run(["stty", "cols", "60", "rows", "24"], stdin=terminal, check=True)
    environment = ENVIRONMENT | {"TERM": "xterm"} | environment
    process = subprocess.Popen([LOOPOS, *arguments], cwd=cwd, env=environment,
                               stdin=terminal, stdout=terminal, stderr=terminal)  # fmt: skip
    os.close(terminal)
    found = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        found += part
    os.close(main)
    assert process.wait(timeout=60) == 0
    return found.decode()


@pytest.mark.skipif(os.name != "posix", reason="needs pseudo-terminals")
def test_on_a_terminal_there_is_a_bar_and_lines_fit(trained):
    directory, _, _ = trained
    shown = on_terminal("run", "run.json", "--output-dir", "tty", cwd=directory)
    assert "\x1b[" in shown
    assert "step 18/18" in shown
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"tokens/s (0:00:\d\d|-:--:--) left", bare)
    assert "evaluation: loss" in shown
    assert shown.rstrip().endswith("next: loopos predict tty 'a text'")
    plain = on_terminal("run", "run.json", "--output-dir", "tty2", cwd=directory, NO_COLOR="1")
    assert "\x1b[3" not in plain.replace("\x1b[31m", "")
    assert "\x1b[9" not in plain
    shown = on_terminal("predict", "out", "[bold]" + "电影 " * 40, "short", cwd=directory)
    long, short = shown.splitlines()
    assert "[bold]电影" in long
    assert long.endswith("...")
    assert sum(1 + (ord(c) > 0x2E80) for c in long) in (59, 60)
    assert short.endswith("  short")
