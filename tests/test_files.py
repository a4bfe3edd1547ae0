"""Writing that leaves nothing half-written, and reading that says what is wrong and where."""

import json
import os

import pytest

from loopos import files
from loopos.errors import DataError, InputError, MissingFileError, OutputError
from loopos.files import (
    atomic_directory,
    atomic_file,
    atomic_write_bytes,
    atomic_write_text,
    read_json,
    read_text,
    tidy,
    write_json,
)


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


# -- files -----------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_parents_and_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    atomic_write_text(path, "first\r\nä 你好 🎉\n")
    assert path.read_bytes() == "first\r\nä 你好 🎉\n".encode()
    atomic_write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["c.txt"]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, MissingFileError])
def test_a_failing_block_leaves_the_old_file(tmp_path, fault):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(fault, match="^stop$"), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise fault("stop")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_failing_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OutputError) as caught:
        atomic_write_text(path, "new")
    assert str(caught.value) == f"{path}: cannot be written (No space left on device)"
    assert isinstance(caught.value, OSError)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("write", [lambda path: atomic_write_text(path, "x"),
                                   lambda path: write_json(path, {})])  # fmt: skip
def test_a_path_below_a_file_cannot_be_written(tmp_path, write):
    (tmp_path / "file").write_text("old")
    path = tmp_path / "file" / "a.txt"
    with pytest.raises(OutputError) as caught:
        write(path)
    assert str(caught.value) in (
        f"{path}: cannot be written (File exists)",
        f"{path}: cannot be written (Not a directory)",
    )
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_directory_is_not_replaced_by_a_file(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    with pytest.raises(OutputError, match=r"a: cannot be written \(Is a directory\)$"):
        atomic_write_text(path, "x")
    assert path.is_dir()
    assert names(tmp_path) == ["a"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(OutputError) as caught, atomic_file(tmp_path / "a"):
        pass
    expected = f"{tmp_path / 'a'}: cannot be written (No such file or directory)"
    assert str(caught.value) == expected
    assert names(tmp_path) == []


def test_writing_goes_through_a_link(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    atomic_write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_json_is_readable_and_refuses_what_is_none(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"name": "ä 你好", "n": [1, 2.5, None, True]})
    assert path.read_text(encoding="utf-8").startswith('{\n  "name": "ä 你好",\n')
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert read_json(path) == {"name": "ä 你好", "n": [1, 2.5, None, True]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path)["n"] == [1, 2.5, None, True]
    assert names(tmp_path) == ["a.json"]


# -- directories -----------------------------------------------------------------------------------


def test_a_directory_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "run" / "model"
    for text, name in (("1", "old.txt"), ("2", "new.txt")):
        with atomic_directory(path) as temporary:
            assert temporary.parent == path.parent
            (temporary / name).write_text(text)
            (temporary / "inner").mkdir()
            (temporary / "inner" / "deep.txt").write_text(text)
    assert names(path) == ["inner", "new.txt"]
    assert (path / "inner" / "deep.txt").read_text() == "2"
    assert names(path.parent) == ["model"]


@pytest.fixture
def old_directory(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old.txt").write_text("old")
    return path


def intact(path):
    return names(path) == ["old.txt"] and names(path.parent) == [path.name]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, MissingFileError, DataError])
def test_a_failing_block_leaves_the_old_directory(old_directory, fault):
    with pytest.raises(fault, match="^stop$"), atomic_directory(old_directory) as temporary:
        (temporary / "half.txt").write_text("half")
        raise fault("stop")
    assert intact(old_directory)


def test_a_file_in_it_that_cannot_be_written_is_named_where_it_would_be(old_directory):
    with pytest.raises(OutputError) as caught, atomic_directory(old_directory) as temporary:
        (temporary / "new").mkdir()
        atomic_write_text(temporary / "new", "x")
    assert str(caught.value) == f"{old_directory}/new: cannot be written (Is a directory)"
    assert intact(old_directory)


def test_a_full_disk_in_the_block_is_an_output_error(old_directory):
    with pytest.raises(OutputError) as caught, atomic_directory(old_directory):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == f"{old_directory}: cannot be written (No space left on device)"
    assert intact(old_directory)


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_leaves_the_old_directory(old_directory, monkeypatch, failing, fault):
    calls, replace = [], os.replace

    def fail_once(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise fault
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail_once)
    expected = OutputError if isinstance(fault, OSError) else KeyboardInterrupt
    with pytest.raises(expected), atomic_directory(old_directory) as temporary:
        (temporary / "new.txt").write_text("new")
    assert intact(old_directory)


def test_the_old_directory_is_never_deleted_before_the_new_one_stands(old_directory, monkeypatch):
    calls, replace = [], os.replace

    def fail_from_the_second(source, target):
        calls.append(source)
        if len(calls) >= 2:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail_from_the_second)
    with pytest.raises(OutputError), atomic_directory(old_directory):
        pass
    # It could not be moved back, but it is there.
    [left] = [entry for entry in old_directory.parent.iterdir() if (entry / "old.txt").exists()]
    assert (left / "old.txt").read_text() == "old"


def test_a_file_is_not_replaced_by_a_directory(tmp_path):
    path = tmp_path / "model"
    path.write_text("old")
    with pytest.raises(OutputError) as caught, atomic_directory(path):
        pass
    assert str(caught.value) == f"{path}: cannot be written (Not a directory)"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_linked_directory_is_replaced_where_it_is(tmp_path):
    target, link = tmp_path / "disk", tmp_path / "model"
    target.mkdir()
    link.symlink_to(target, target_is_directory=True)
    with atomic_directory(link) as temporary:
        (temporary / "new.txt").write_text("new")
    assert link.is_symlink()
    assert names(target) == ["new.txt"]
    assert names(tmp_path) == ["disk", "model"]


# -- what killed writers left ----------------------------------------------------------------------


def test_only_what_killed_writers_of_these_names_left_is_cleared(tmp_path):
    kept = [".a.json.1234abcd.bak", ".a.json.tmp", ".b.json.1234abcd.tmp", "a.json", "a.tmp",
            ".a.json.1234ABCD.tmp", "x.a.json.1234abcd.tmp"]  # fmt: skip
    for name in [*kept, ".a.json.1234abcd.tmp", ".model.00000000.old.tmp"]:
        (tmp_path / name).write_text(name)
    for place in (tmp_path / "model", tmp_path / ".model.11111111.tmp", tmp_path / "other"):
        place.mkdir()
        (place / ".weights.9999ffff.tmp").write_text("half")
        (place / "weights").write_text("whole")
    tidy(tmp_path, ["a.json", "model"])
    assert names(tmp_path) == sorted([*kept, "model", "other"])
    assert names(tmp_path / "model") == ["weights"]
    assert names(tmp_path / "other") == [".weights.9999ffff.tmp", "weights"]
    tidy(tmp_path / "absent", ["a.json"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("call", "found"), [(1, "old"), (2, "old"), (3, "new"), (4, "new")])
def test_a_directory_killed_while_it_is_replaced_is_the_old_or_the_new(old_directory, call, found):
    """The renames: the old one aside, the new one in its place, the old one to be deleted."""
    child = os.fork()
    if child == 0:
        left = [call]

        def dying(function):
            def wrapped(*arguments, **keywords):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return function(*arguments, **keywords)

            return wrapped

        os.replace = dying(os.replace)
        with atomic_directory(old_directory) as temporary:
            (temporary / "new.txt").write_text("new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if call < 4 else 0)
    tidy(old_directory.parent, [old_directory.name])
    assert names(old_directory.parent) == [old_directory.name]
    assert names(old_directory) == [f"{found}.txt"]


def test_what_cannot_be_cleared_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    (tmp_path / ".a.1234abcd.tmp").write_text("half")
    monkeypatch.setattr(files.Path, "unlink", refuse)
    with pytest.raises(OutputError) as caught:
        tidy(tmp_path, ["a"])
    expected = f"{tmp_path / '.a.1234abcd.tmp'}: cannot be deleted (Read-only file system)"
    assert str(caught.value) == expected


# -- reading ---------------------------------------------------------------------------------------


def test_text_is_read_strictly(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(path) == "one\r\ntwo"
    path.write_bytes(b"one\ntwo\nr\xe9sum\xe9\n")
    with pytest.raises(DataError) as caught:
        read_text(path, DataError)
    assert str(caught.value) == f"{path}:3: not UTF-8 text (byte 0xe9)"


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(MissingFileError) as caught:
        read_text(tmp_path / "absent")
    assert str(caught.value) == f"{tmp_path / 'absent'}: no such file"
    with pytest.raises(DataError) as caught:
        read_text(tmp_path, DataError)
    assert str(caught.value) == f"{tmp_path}: cannot be read (Is a directory)"
    with pytest.raises(InputError, match=r"cannot be read \(File name too long\)$"):
        read_text(tmp_path / ("a" * 5000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: not valid JSON (Expecting value)"),
        (
            '{\n  "a": 1,\n',
            ":3: not valid JSON (Expecting property name enclosed in double quotes)",
        ),
        ("[1, 2]", ":1: expected a JSON object, found list"),
        ("[" * 100_000, ":1: not valid JSON (nested too deeply)"),
        ('{"a": ' + "1" * 5000 + "}", ":1: not valid JSON (a number with too many digits)"),
    ],
)
def test_json_faults_are_one_sentence(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_json(path, DataError)
    assert str(caught.value) == f"{path}{message}"


def test_text_faults_of_json_are_those_of_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{\n"a": "\xff"}')
    with pytest.raises(DataError) as caught:
        read_json(path, DataError)
    assert str(caught.value) == f"{path}:2: not UTF-8 text (byte 0xff)"
    with pytest.raises(MissingFileError) as caught:
        read_json(tmp_path / "b.json", DataError)
    assert str(caught.value) == f"{tmp_path / 'b.json'}: no such file"


def test_json_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": "\u2028"}), encoding="utf-8")
    assert read_json(path) == {"a": "\u2028"}
