"""Stores of texts, places and token ids: as good as lists, and no larger than memory allows."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopos.data import store
from loopos.data.readers import LabelledTexts, Texts, read_labelled, read_texts, split
from loopos.data.report import DataReport
from loopos.data.store import (
    Places,
    PlacesBuilder,
    TextStore,
    TokenStoreBuilder,
    first_of_each,
)
from loopos.data.tokenizer import train_bpe
from loopos.errors import DataError, OutputError
from loopos.methods.common import encode, encode_all
from loopos.runner import _identity

#: In memory, and in a file from the first byte on.
LIMITS = st.sampled_from([None, 0, 5])
TEXTS = st.lists(st.text(st.characters(exclude_categories=())))  # halves of pairs too


def tokens_of(arrays, limit=None):
    builder = TokenStoreBuilder(limit)
    for ids in arrays:
        builder.append(ids)
    return builder.finish()


# -- as good as a list -------------------------------------------------------------------------


@given(TEXTS, LIMITS, st.data())
def test_a_store_of_texts_is_the_list_of_them(texts, limit, data):
    found = TextStore.of(texts, limit)
    assert list(found) == texts
    assert found == texts
    assert texts == found
    assert found == TextStore.of(texts)
    assert [found[i] for i in range(-len(texts), len(texts))] == texts * 2
    assert (len(found), bool(found)) == (len(texts), bool(texts))
    assert found != [*texts, "x"]
    assert found.__add__(["x"]) == [*texts, "x"]
    cut = data.draw(st.slices(len(texts)))
    assert found[cut] == texts[cut]
    indices = data.draw(st.lists(st.integers(-len(texts), len(texts) - 1))) if texts else []
    picked = found.take(indices)
    assert picked == [texts[i] for i in indices]
    # Of a view another view, with repeats and from the end.
    again = data.draw(st.lists(st.integers(0, len(picked) - 1))) if indices else []
    assert list(picked.take(np.array(again, int))) == [texts[indices[i]] for i in again]
    for place in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            found[place]
        with pytest.raises(IndexError):
            found.take([place])


@given(st.lists(st.tuples(st.sampled_from(["a.csv", "b:c.csv", None]), st.integers(1, 2**40))))
def test_places_are_texts_when_they_are_asked_for(rows):
    builder = PlacesBuilder()
    for file, number in rows:
        builder.append(file, number)
    places = builder.finish()
    expected = [f"row {n}" if file is None else f"{file}:{n}" for file, n in rows]
    assert places == expected
    assert places[::-2] == expected[::-2]
    assert places.take([0, 0] if rows else []) == expected[:1] * 2


IDS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9)


@given(st.lists(IDS), LIMITS)
def test_a_store_of_tokens_is_the_list_of_them(sequences, limit):
    arrays = [np.array(ids, np.int32) for ids in sequences]
    found = tokens_of(arrays, limit)
    assert [ids.tolist() for ids in found] == sequences
    assert found == arrays
    assert all(ids.dtype == np.int32 for ids in found)
    assert found.lengths.tolist() == [len(ids) for ids in sequences]
    assert [ids.tolist() for ids in found[1:3]] == sequences[1:3]
    assert found[::-1].lengths.tolist() == [len(ids) for ids in sequences[::-1]]
    for ids in found:
        with pytest.raises(ValueError, match="read-only"):
            ids[...] = 0


def test_ids_of_any_kind_of_integer_are_taken_if_they_fit():
    assert tokens_of([[1, 2], np.array([3], np.int64), np.zeros(0)])[1].tolist() == [3]
    for ids in ([2**31], np.array([2**40]), [0.5]):
        with pytest.raises(DataError, match=r"^text 0: a token id does not fit 32 bits$"):
            tokens_of([ids])


@given(st.lists(TEXTS, max_size=3))
def test_the_first_of_each_text_is_found(sets):
    texts = [text for part in sets for text in part]
    assert first_of_each(*sets).tolist() == [texts.index(text) for text in texts]


def test_stores_show_little_of_themselves():
    assert repr(TextStore.of("abcde")) == "<TextStore of 5: ['a', 'b', 'c', ...]>"
    with pytest.raises(TypeError, match="unhashable"):
        hash(TextStore.of("a"))


# -- data sets in a file -----------------------------------------------------------------------


def write_rows(path, count=400):
    rows = [{"text": f"text {i % 210} é " * (1 + i % 7), "label": i % 3} for i in range(count)]
    rows.insert(7, {"text": " ", "label": 0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def both(tmp_path, monkeypatch):
    """Return the same data set in memory and in files."""
    path = write_rows(tmp_path / "t.jsonl")
    held = read_labelled(path)
    monkeypatch.setattr(store, "MEMORY_LIMIT", 100)
    monkeypatch.setattr(store, "_WALK", 1000)  # lets go of its pages many times
    return held, read_labelled(path)


def rows(data):
    return list(zip(data.texts, data.where, data.labels.tolist(), strict=True))


def test_everything_is_the_same_whatever_holds_the_texts(both):
    held, stored = both
    plain = replace(held, texts=list(held.texts), where=list(held.where))
    assert rows(held) == rows(stored) == rows(plain)
    sides = [split(data, 0.3, 1) for data in (held, stored, plain)]
    for side in (0, 1):
        assert rows(sides[0][side]) == rows(sides[1][side]) == rows(sides[2][side])
    reports = [
        DataReport.build(training, validation, np.array([len(t) for t in training.texts]), 50)
        for training, validation in sides
    ]
    assert reports[0] == reports[1] == reports[2]
    assert (reports[0].duplicates.count, reports[0].dropped.count) == (190, 1)
    tokenizer = train_bpe(stored.texts, 300)
    assert tokenizer.encode("text 7 é") == train_bpe(plain.texts, 300).encode("text 7 é")
    encoded = [encode(tokenizer, data.texts, 20, data.where) for data in (held, stored, plain)]
    expected = tokenizer.encode_batch(list(plain.texts), 20)
    assert all(found.tokens == expected for found in encoded)
    whole = [len(ids) for ids in tokenizer.encode_batch(list(plain.texts))]
    assert all(found.lengths.tolist() == whole for found in encoded)


class _Prepared:
    def __init__(self, training, validation=None):
        from loopos.models.config import TransformerConfig

        config = TransformerConfig(d_model=8, num_heads=1, num_layers=1, d_ff=8, vocab_size=9)
        self.training, self.validation = training, validation
        self.model = type("Model", (), {"config": config})


def test_the_digest_of_data_is_that_of_its_values(both):
    def digest(*data):
        return _identity(_Prepared(*data))["data_sha256"]

    held, stored = both
    expected = hashlib.sha256()
    for data in (held, stored):
        expected.update("".join(f"{text}\0" for text in data.texts).encode())
        expected.update(f"({data.label_names!r}, {data.labels.tolist()!r})".encode() + b"\1")
    assert digest(held, stored) == digest(stored, held) == expected.hexdigest()
    # Of many labels too, which are not written out at once, of every kind.
    count = 25_001
    texts = Texts(["a"] * count, ["row 1"] * count)
    for labels in (np.arange(count), np.arange(count) / 3, np.eye(3, dtype=np.int8)[[1] * count]):
        data = LabelledTexts(texts.texts, texts.where, labels, ["a", "b"])
        expected = hashlib.sha256(b"a\0" * count)
        expected.update(f"(['a', 'b'], {labels.tolist()!r})".encode() + b"\1\1")
        assert digest(data) == expected.hexdigest()


def test_texts_are_encoded_once_for_a_tokenizer_and_length(both):
    _, stored = both
    asked = []

    class Counting:
        def encode_batch(self, texts, max_length=None):
            asked.extend(texts)
            return [np.arange(len(text), dtype=np.int32)[:max_length] for text in texts]

    first = Counting()
    encoded = encode(first, stored.texts, 400)
    assert len(asked) == 400
    assert encode(first, stored.texts, 400, stored.where) is encoded
    assert len(asked) == 400
    assert encode(first, stored.texts, 401) is not encoded
    assert encode_all(first, stored.texts).lengths.tolist() == encoded.lengths.tolist()
    assert encode(Counting(), stored.texts, 400) is not encoded
    assert len(asked) == 1600
    # Lists may change between two calls.
    texts = list(stored.texts)
    assert encode(first, texts, 400) is not encode(first, texts, 400)


def test_a_text_without_tokens_is_named():
    class Silent:
        def encode_batch(self, texts, max_length=None):
            return [np.arange(len(text), dtype=np.int32) for text in texts]

    texts = TextStore.of(["a", "", ""])
    for where, place in ((None, "text 1"), (["x", "t.csv:9", "y"], "t.csv:9")):
        with pytest.raises(DataError, match=rf"^{place}: the tokenizer finds no token"):
            encode(Silent(), texts, 5, where)
    assert encode_all(Silent(), texts).lengths.tolist() == [1, 0, 0]
    assert len(encode(Silent(), [], 5).tokens) == 0


def test_stores_may_be_read_by_several_threads(both):
    _, stored = both
    texts = list(stored.texts)
    arrays = [np.arange(i % 50, dtype=np.int32) for i in range(400)]
    tokens = tokens_of(arrays)
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for i in rng.integers(0, 400, 2000):
            if stored.texts[i] != texts[i] or not np.array_equal(tokens[i], arrays[i]):
                wrong.append(i)
        if stored.texts != texts or tokens != arrays:
            wrong.append(None)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- files that nobody sees --------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said(monkeypatch):
    def full(**options):
        return open("/dev/full", "wb")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OutputError) as caught:
        TextStore.of(["a" * 100], 10)
    assert str(caught.value) == (
        f"{tempfile.gettempdir()}: data that memory is too small for cannot be written there "
        "(No space left on device); the environment variable TMPDIR names another directory"
    )


def test_no_place_for_temporary_files_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OutputError, match=r"none: data that memory is too small for cannot be"):
        TextStore.of(["a" * 100], 10)

    def none(**options):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", none)
    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(OutputError, match=r"^temporary files: .* \(No usable temporary directory"):
        TextStore.of(["a" * 100], 10)


def run(script, tmp_path, *arguments):
    temporary = tmp_path / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(temporary), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ), temporary


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_nothing_is_left_of_a_process_that_is_killed(tmp_path):
    script = """
        import sys
        from loopos.data import store
        from loopos.data.readers import read_labelled
        store.MEMORY_LIMIT = 1000
        data = read_labelled(sys.argv[1])
        unfinished = store.TextStoreBuilder()
        unfinished.append("a" * 5000)
        print(type(data.texts._data).__name__, flush=True)
        sys.stdin.read()
    """
    process, temporary = run(script, tmp_path, write_rows(tmp_path / "t.jsonl"))
    with process:
        assert process.stdout.readline() == "mmap\n"
        assert list(temporary.iterdir()) == []  # it has no name while it is used, either
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(temporary.iterdir()) == []


#: Reads a file, encodes its texts, splits and reports them, and says how much memory that took.
LARGE = """
    import hashlib, json, sys
    import numpy as np
    from loopos.data import store
    from loopos.data.readers import read_labelled, split
    from loopos.data.report import DataReport
    from loopos.methods.common import encode

    class Quick:  # a tokenizer that is done at once, with as many bytes of tokens as of text
        def encode_batch(self, texts, max_length=None):
            return [np.frombuffer(text.encode()[: len(text) // 4 * 4], np.int32) for text in texts]

    def most():  # not ru_maxrss: that of a child begins with what its parent had
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    store.MEMORY_LIMIT = int(sys.argv[2])
    before = most()
    data = read_labelled(sys.argv[1])
    training, validation = split(data, 0.1, 0)
    sides = [encode(Quick(), part.texts, 9999, part.where) for part in (training, validation)]
    report = DataReport.build(training, validation, sides[0].lengths, 500, sides[1].lengths)
    digest = hashlib.sha256(json.dumps(report.to_dict()).encode())
    for part, encoded in zip((training, validation), sides):
        for values in (part.texts, part.where):
            for text in values:
                digest.update(text.encode())
        for ids in encoded.tokens:
            digest.update(ids)
        digest.update(encoded.lengths)
        digest.update(part.labels)
    print(json.dumps([most() - before, digest.hexdigest()]))
"""


needs_counts = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's own counts"
)


@needs_counts
def test_a_file_larger_than_memory_should_hold(tmp_path):
    path = tmp_path / "large.jsonl"
    words = "word " * 400
    with path.open("w") as file:
        for i in range(75_000):
            file.write(f'{{"text": "{i} {words}", "label": {i % 4}}}\n')
    size = path.stat().st_size
    assert size > 150e6
    found = []
    for limit in (1 << 20, 1 << 40):
        process, temporary = run(LARGE, tmp_path, path, limit)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        found.append(json.loads(output))
        assert list(temporary.iterdir()) == []
    (taken, digest), (whole, expected) = found
    assert digest == expected
    # Held at once, texts and tokens take twice the file's size. Read one by one they take what
    # three stores may hold (3 MiB) and a walk may touch (8 MiB and what is under way), a chunk of
    # texts with its tokens (1 MiB), and of each row about 150 bytes of offsets, places, labels,
    # digests and what sorts them (11 MB).
    assert whole > 1.9 * size
    assert taken < 48e6 < size / 3


@needs_counts
@pytest.mark.parametrize("name", ["large.csv", "large.parquet"])
def test_tables_larger_than_memory_should_hold(tmp_path, name):
    path, words = tmp_path / name, "word " * 400
    if name.endswith("csv"):
        lines = (f"{i} {words},{i % 4}\n" for i in range(60_000))
        with path.open("w") as file:
            file.writelines(["text,label\n", *lines])
    else:
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = {"text": [f"{i} {words}" for i in range(60_000)], "label": [0, 1] * 30_000}
        # As one row group, without compression: the worst case.
        parquet.write_table(arrow.table(columns), path, compression="none", use_dictionary=False)
    size = path.stat().st_size
    assert size > 120e6
    script = """
        import importlib, sys
        from loopos.data import store
        from loopos.data.readers import read_labelled
        if sys.argv[1].endswith("parquet"):
            importlib.import_module("pyarrow.parquet")
        def most():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
        store.MEMORY_LIMIT = 1 << 20
        before = most()
        data = read_labelled(sys.argv[1])
        print(len(data.texts), (most() - before) * 1024)
    """
    process, _ = run(script, tmp_path, path)
    output, _ = process.communicate(timeout=300)
    count, taken = map(int, output.split())
    # The store's limit and the readers' buffers (2 MiB), a batch of 512 rows, in pyarrow and as
    # Python's values (2 MB), and what pyarrow sets up for itself (about 20 MB, whatever the size).
    assert count == 60_000
    assert taken < 48e6 < size / 2


def test_a_large_text_is_one_text(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MEMORY_LIMIT", 1000)
    text = "é" * 3_000_000
    (tmp_path / "t.txt").write_text(f"{text}\fb", encoding="utf-8")
    data = read_texts(tmp_path / "t.txt")
    assert data.texts == [text, "b"]
    assert data.texts[0] == text
    assert isinstance(data.where, Places)
