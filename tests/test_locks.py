"""One run a directory: whoever comes second is refused at once, and the first never notices."""

import errno
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from loopos import ops
from loopos.autograd import Parameter
from loopos.data.batch import Batch
from loopos.errors import InputError, OutputError
from loopos.files import locked_directory
from loopos.training.loop import TrainingOptions, train
from loopos.training.trackers import Callback

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
quiet_fork = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def told(directory):
    return (
        f"{directory}: another run is going in this directory; wait for its end, or choose "
        "another directory"
    )


def refusal(directory):
    """What somebody who wants to lock `directory` is told; None if nothing."""
    try:
        with locked_directory(directory):
            return None
    except InputError as error:
        return str(error)


def elsewhere(function, *arguments):
    """Return what a function returns in another thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments)))
    thread.start()
    thread.join()
    return found[0]


def forked(function):
    """Return what a function returns, a short text or None, in a fork of this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, (function() or "").encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text or None


def in_process(directory):
    code = """
        import sys
        from loopos.files import locked_directory
        try:
            with locked_directory(sys.argv[1]):
                print("free")
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_another_thread_is_refused_and_the_same_one_goes_in_again(tmp_path):
    with locked_directory(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]
        assert elsewhere(refusal, tmp_path) == told(tmp_path)
        with locked_directory(tmp_path / "." / "..") as _, locked_directory(tmp_path):
            assert refusal(tmp_path) is None
        assert os.listdir(tmp_path) == [".lock"]
        assert elsewhere(refusal, tmp_path) == told(tmp_path)  # the inner end freed nothing
    assert os.listdir(tmp_path) == []
    assert elsewhere(refusal, tmp_path) is None


def test_another_process_is_refused(tmp_path):
    with locked_directory(tmp_path):
        assert in_process(tmp_path) == f"InputError: {told(tmp_path)}"
    assert in_process(tmp_path) == "free"
    assert os.listdir(tmp_path) == []


@needs_fork
@quiet_fork
def test_a_fork_is_refused_and_its_end_frees_nothing(tmp_path):
    with locked_directory(tmp_path):
        assert forked(lambda: refusal(tmp_path)) == told(tmp_path)
        assert elsewhere(refusal, tmp_path) == told(tmp_path)
    assert forked(lambda: refusal(tmp_path)) is None


@needs_fork
@quiet_fork
def test_a_fork_that_leaves_the_block_frees_nothing(tmp_path):
    read, write = os.pipe()
    with locked_directory(tmp_path / "new"):
        child = os.fork()
        parent = child != 0
        if parent:
            os.close(write)
            os.read(read, 1)  # until the child has left the block
            assert os.listdir(tmp_path / "new") == [".lock"]
            assert elsewhere(refusal, tmp_path / "new") == told(tmp_path / "new")
    if not parent:
        os.close(write)
        os._exit(0)
    os.waitpid(child, 0)
    assert os.listdir(tmp_path) == []


@needs_fork
@quiet_fork
def test_a_killed_holder_frees_it_though_a_fork_of_it_lives(tmp_path):
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with locked_directory(tmp_path):
            worker = os.fork()
            if worker == 0:
                os.write(write, b"x")
                threading.Event().wait(30)
                os._exit(0)
            os.write(write, f"{worker}\n".encode())
            threading.Event().wait(30)
        os._exit(0)
    text = b""
    while b"x" not in text or b"\n" not in text:
        text += os.read(read, 100)
    worker = int(text.replace(b"x", b""))
    try:
        assert refusal(tmp_path) == told(tmp_path)
        os.kill(holder, 9)
        os.waitpid(holder, 0)
        assert os.listdir(tmp_path) == [".lock"]
        assert refusal(tmp_path) is None
        assert os.listdir(tmp_path) == []
    finally:
        os.kill(worker, 9)


def test_a_directory_by_another_name_is_the_same(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    with locked_directory(tmp_path / "real"):
        assert elsewhere(refusal, tmp_path / "link") == told(tmp_path / "link")
        assert refusal(tmp_path / "link") is None
    assert os.listdir(tmp_path / "real") == []


def test_directories_are_made_and_taken_away_if_they_stay_empty(tmp_path):
    deep = tmp_path / "a" / "b" / "c"
    with pytest.raises(ZeroDivisionError), locked_directory(deep):
        assert deep.is_dir()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").mkdir()
    with locked_directory(deep):
        pass
    assert os.listdir(tmp_path / "a") == []
    with locked_directory(deep):
        (deep / "file").write_text("x")
    assert os.listdir(deep) == ["file"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(30, "Read-only file system"), "Read-only file system"),
     (OSError(28, "No space left on device"), "No space left on device"),
     (PermissionError(13, "Permission denied"), "Permission denied")],
)  # fmt: skip
def test_what_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, error, reason):
    plain = os.open

    def refuse(path, *arguments, **keywords):
        if str(path).endswith(".lock"):
            raise error
        return plain(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError) as caught, locked_directory(tmp_path / "out"):
        pytest.fail("the block was entered")
    assert str(caught.value) == f"{tmp_path / 'out'}: cannot be written ({reason})"
    assert os.listdir(tmp_path) == []


def test_a_file_is_no_directory_to_lock(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputError) as caught, locked_directory(path):
            pytest.fail("the block was entered")
        assert str(caught.value) == f"{path}: cannot be written (Not a directory)"
    assert (tmp_path / "file").read_text() == "x"


def test_a_directory_removed_while_it_is_looked_at_is_made_again(tmp_path, monkeypatch):
    """Another run has made it when this one tries, and removes it after this one's first look."""
    target = tmp_path / "out"
    plain_mkdir, plain_lstat = Path.mkdir, os.lstat
    looks = []

    def mkdir(path, *arguments, **keywords):
        plain_mkdir(path, *arguments, **keywords)
        if not looks:
            monkeypatch.setattr(os, "lstat", lstat)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def lstat(path, **keywords):
        found = plain_lstat(path, **keywords)
        if os.fspath(path) == os.fspath(target):
            monkeypatch.setattr(os, "lstat", plain_lstat)
            looks.append(path)
            target.rmdir()
        return found

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with locked_directory(target):
        assert (target / ".lock").exists()
    assert len(looks) == 1
    assert os.listdir(tmp_path) == []


def test_of_many_that_come_at_once_one_is_in(tmp_path):
    """They make, lock, free and remove the directory again and again; none ever meets another."""
    inside, most, entered = [], [], []
    problems = []
    start = threading.Barrier(6)

    def work(number):
        start.wait()
        for _ in range(60):
            try:
                with locked_directory(tmp_path / "out"):
                    inside.append(number)
                    most.append(len(inside))
                    entered.append(number)
                    inside.remove(number)
            except InputError:
                pass
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert set(most) == {1}
    assert len(entered) >= 1
    # Who made the directory may have been refused in it, and who was let in did not make it.
    assert [path for path in tmp_path.rglob("*") if path.name != "out"] == []


# -- runs ----------------------------------------------------------------------------------------


def snapshot(directory):
    return {str(p): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def fit(directory, callbacks=(), resume=False):
    parameters = {"w": Parameter(np.zeros((2, 3)), "w")}

    class Work:
        def counts(self, batch):
            return {"loss": float(len(batch.labels))}

        def losses(self, batch, dropout):
            x = np.eye(3)[batch.tokens % 3]
            h = ops.linear(ops.Tensor(x), parameters["w"])
            return {"loss": ops.cross_entropy(h, batch.labels)[0]}

    def make(indices, sample_ids):
        return Batch.from_sequences(
            [np.array([i]) for i in indices], labels=indices % 2, sample_ids=sample_ids
        )

    options = TrainingOptions(learning_rate=0.1, batch_size=2, num_epochs=1)
    result = train(parameters, Work(), make, np.ones(8, np.int64), options, output_dir=directory,
                   callbacks=callbacks, resume=resume)  # fmt: skip
    return result.steps, parameters["w"].data.tobytes()


@pytest.mark.parametrize("resume", [False, True])
def test_train_is_refused_where_a_run_is_going_and_changes_nothing(tmp_path, resume):
    seen = []

    class Second(Callback):
        def on_step(self, record):
            if record["step"] == 2:
                before = snapshot(tmp_path)
                seen.append(elsewhere(attempt))
                assert snapshot(tmp_path) == before

    def attempt():
        try:
            fit(tmp_path, resume=resume)
        except InputError as error:
            return str(error)

    assert fit(tmp_path, [Second()]) == fit(None)
    assert seen == [told(tmp_path)]
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "metrics.jsonl"]
