"""Standard streams that are closed, full or no longer read: nothing is lost, no traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = {
    "model": {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 300},
    "computation": {"method": "fine_tuning"},
    "training": {"learning_rate": 0.01, "batch_size": 4, "num_epochs": 2},
    "data": {"training_data": "t.csv", "output_dir": "out"},
}
LOOPOS = f"'{sys.executable}' -m loopos"


@pytest.fixture
def project(tmp_path):
    rows = [f"{('cold', 'warm')[i % 2]} film {i},{('neg', 'pos')[i % 2]}" for i in range(24)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (tmp_path / "run.json").write_text(json.dumps(CONFIG))
    return tmp_path


def shell(line, cwd):
    done = subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_behind_standard_output_is_one_sentence(project):
    done = shell(f"{LOOPOS} configs > /dev/full", project)
    assert done.returncode == 2
    assert done.stderr == ("error: standard output: cannot be written (No space left on device)\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_run_needs_no_standard_stream(project, closed):
    assert shell(f"{LOOPOS} run run.json {closed}", project).returncode == 0
    assert (project / "out" / "model" / "model.safetensors").is_file()


def test_closed_standard_input_holds_no_text(project):
    assert shell(f"{LOOPOS} run run.json", project).returncode == 0
    done = shell(f"{LOOPOS} predict out <&-", project)
    assert (done.returncode, done.stderr) == (2, "error: there is no text to classify\n")


def test_a_run_goes_on_when_the_reader_of_its_progress_leaves(project):
    line = f"{LOOPOS} run run.json --set training.eval_steps=1 2> >(head -1 >&2) > out.txt"
    done = shell(line, project)
    assert done.returncode == 0
    assert "saved in out" in (project / "out.txt").read_text()
    records = [json.loads(r) for r in (project / "out/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 12


def test_the_signal_handler_writes_into_no_file_of_the_run(project):
    line = f"exec {LOOPOS} run run.json --set training.num_epochs=9999 2>&-"
    process = subprocess.Popen(["bash", "-c", line], cwd=project, stdout=subprocess.DEVNULL)
    metrics, end = project / "out" / "metrics.jsonl", time.monotonic() + 50
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    files = [path for path in (project / "out").rglob("*") if path.is_file()]
    assert any(path.parent.parent.name == "checkpoints" for path in files)
    assert not [path for path in files if b"stopping after this step" in path.read_bytes()]
