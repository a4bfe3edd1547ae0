"""Tokenizers, through the `tokenizers` library: read those of models, train byte-level BPE."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loopos.errors import DataError, MissingFileError, ModelFormatError
from loopos.files import atomic_write_text, is_gguf, read_json, read_text, write_json
from loopos.hub import local_path, nearest_path

__all__ = ["Tokenizer", "load_tokenizer", "train_bpe"]

Array = np.ndarray[Any, Any]

END_OF_TEXT = "<|endoftext|>"
#: What may close a text, when the tokenizer's own configuration names nothing.
_END_CANDIDATES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")


#: How tokens show a space that they begin with.
_SPACES = ("Ġ", "▁")
_TEMPLATE_FILE = "chat_template.jinja"
#: Where a model says which tokens end what it generates: the first file counts.
_GENERATION_FILE, _MODEL_FILE = "generation_config.json", "config.json"
#: Of adapters: which model they belong to.
_ADAPTER_FILE = "adapter_config.json"
#: What is fetched of a model on the Hub.
_HUB_FILES = (
    "tokenizer.json", "tokenizer_config.json", _TEMPLATE_FILE,
    "vocab.json", "merges.txt", "vocab.txt", _GENERATION_FILE, _MODEL_FILE, _ADAPTER_FILE,
)  # fmt: skip
_VOCABULARIES = {
    "tokenizer.json", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "vocab.txt",
}  # fmt: skip


class Tokenizer:
    """Text to token ids and back.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        Its padding and truncation are switched off: loopos never pads, and truncates on request.
    eos_token : str, optional
        The token that closes a text.
    config : dict, optional
        ``tokenizer_config.json`` as it was read; saved back.

    Attributes
    ----------
    chat_template : str or None
        The Jinja template that writes messages as one text, from `config`; may be set, and is
        saved.
    further_ends : tuple of int
        Tokens that end what the model generates, beside the one that closes a text; may be set,
        and is saved.
    """

    def __init__(
        self, backend: Any, eos_token: str | None = None, config: dict[str, Any] | None = None
    ):
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._config = config or {}
        self.chat_template = _chat_template(self._config)
        candidates = [eos_token] if eos_token else _END_CANDIDATES
        self.eos_token = next((t for t in candidates if backend.token_to_id(t) is not None), None)
        self.further_ends: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, so that every id fits a table of this size."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_id(self) -> int | None:
        """Id of the token that closes a text, if there is one."""
        return None if self.eos_token is None else self.token_to_id(self.eos_token)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of all tokens that end what the model generates, first the one that closes a text."""
        first = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys([*first, *self.further_ends]))

    @property
    def special_tokens(self) -> dict[str, str]:
        """The tokens that the configuration names, such as ``bos_token``, by these names."""
        found = {n: _token(self._config, n) for n in (*self._config, "eos_token")
                 if isinstance(n, str) and n.endswith("_token")}  # fmt: skip
        found["eos_token"] = found["eos_token"] or self.eos_token
        return {name: token for name, token in found.items() if token is not None}

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for themselves, such as those around a message."""
        return frozenset(self._backend.get_added_tokens_decoder())

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, None when it is unknown."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Return the ids of a text, with the special tokens that the tokenizer adds.

        Parameters
        ----------
        text : str
        max_length : int, optional
            Ids at the most; the text is cut, closing special tokens stay.

        Raises
        ------
        DataError
            If it is not text, or no room is left beside the special tokens.
        """
        ids: list[int] = self.encode_batch([text], max_length)[0].tolist()
        return ids

    def encode_batch(
        self, texts: Sequence[str], max_length: int | None = None, *, special_tokens: bool = True
    ) -> list[Array]:
        """Return the ids of each text as int32; see :meth:`encode`.

        Without `special_tokens` those that the tokenizer adds are left out, and nothing is cut.
        """
        if isinstance(texts, str):
            raise DataError("expected a list of texts, found one text")
        texts = list(_checked(texts))
        if max_length is None:
            encodings = self._backend.encode_batch(texts, add_special_tokens=special_tokens)
            return [np.array(e.ids, dtype=np.int32) for e in encodings]
        return self._truncated(texts, max_length)

    def encode_open(self, texts: Sequence[str]) -> list[Array]:
        """Return the ids of texts that go on: without the end that some tokenizers put behind.

        An end of text that a text itself writes out stays; errors as :meth:`encode`.
        """
        found, end = self.encode_batch(texts), self.eos_id
        closed = [end is not None and ids[-1:].tolist() == [end] for ids in found]
        if not any(closed):
            return found
        bare = self.encode_batch(texts, special_tokens=False)
        for index, (ids, written) in enumerate(zip(found, bare, strict=True)):
            ends_in = ids[:-1][-len(written) :]  # what was written, if the end was added
            if closed[index] and len(written) and np.array_equal(ends_in, written):
                found[index] = ids[:-1]
        return found

    def closed(self, ids: Array) -> Array:
        """Return ids with the token that closes a text behind them, unless they end with it.

        Without such a token they stay as they are.
        """
        end = self.eos_id
        return ids if end is None or ids[-1:].tolist() == [end] else np.append(ids, np.int32(end))

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = False
    ) -> tuple[Array, Array]:
        """Return the ids of a text, int32 [n], and where each stands in it, int64 [n, 2].

        Parameters
        ----------
        text : str
        add_special_tokens : bool
            Whether the tokenizer adds its own; those that the text writes out are tokens anyway.

        Raises
        ------
        DataError
            If it is not text.
        """
        (text,) = _checked([text])
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        # Some tokenizers leave the spaces that a token begins with out of its offsets.
        spaced = np.array([token[:1] in _SPACES for token in encoding.tokens], dtype=bool)
        begin = np.append(0, offsets[:-1, 1])
        np.copyto(offsets[:, 0], np.minimum(offsets[:, 0], begin), where=spaced & (begin > 0))
        return np.array(encoding.ids, dtype=np.int32), offsets

    def _truncated(self, texts: list[str], max_length: int) -> list[Array]:
        room = max_length - self._backend.num_special_tokens_to_add(False)
        if room < 1:
            raise DataError(f"max_length {max_length} leaves no room beside the special tokens")
        # Cut without special tokens, then let the post-processor add them: no state is changed.
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        for encoding in encodings:
            encoding.truncate(room)
        whole = [self._backend.post_process(encoding) for encoding in encodings]
        return [np.array(e.ids, dtype=np.int32) for e in whole]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text of some ids.

        Parameters
        ----------
        ids : iterable of int
            Those over the vocabulary give nothing: models have tables with rows to spare.
        skip_special_tokens : bool

        Raises
        ------
        DataError
            If an id is no whole number from 0.
        """
        numbers = []
        for id_ in ids:
            if not isinstance(id_, (int, np.integer)) or not 0 <= id_ < 2**32:
                raise DataError(f"expected token ids from 0, found {id_!r}")
            numbers.append(int(id_))
        text: str = self._backend.decode(numbers, skip_special_tokens=skip_special_tokens)
        return text

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` (raises OutputError).

        Further tokens that end a text go into ``generation_config.json``, where transformers looks
        for them and where all else that it says stays. Without such tokens it is not touched: it
        may be of the model that lies there.
        """
        directory = Path(directory)
        atomic_write_text(directory / "tokenizer.json", self._backend.to_str(pretty=True))
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self._config
        if self.eos_token is not None:
            config.setdefault("eos_token", self.eos_token)
        if self.chat_template != _chat_template(config):
            config["chat_template"] = self.chat_template
        (directory / _TEMPLATE_FILE).unlink(missing_ok=True)  # it would override what is saved
        write_json(directory / "tokenizer_config.json", config)
        if self.further_ends:
            file = directory / _GENERATION_FILE
            known = read_json(file, ModelFormatError) if file.is_file() else {}
            write_json(file, known | {"eos_token_id": list(self.end_ids)})


def _checked(texts: Iterable[Any]) -> Iterator[str]:
    """Yield what are texts; the library would take a tuple for a pair, and says little else."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {index}: expected a string, found {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"text {index}: has half a surrogate pair, so no text") from error
        yield text


# -- reading -------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a model, its chat template, and which tokens end a text.

    Parameters
    ----------
    path : path or str
        A directory with ``tokenizer.json``, or GPT-2's ``vocab.json`` and ``merges.txt`` (also
        under their first names ``encoder.json`` and ``vocab.bpe``), or BERT's ``vocab.txt``; or
        one of these files, or a ``.gguf`` file; or, given as a string and where there is no such
        path, the name of a model on the Hugging Face Hub, "org/name" or "org/name@revision", of
        which only those files are fetched. Of adapters that come without one, that of their base.

    Raises
    ------
    MissingFileError
        If there is no tokenizer.
    ModelFormatError
        If its files are damaged.

    Notes
    -----
    Beside the token that closes a text, those end one that ``generation_config.json`` names as
    ``eos_token_id``, or, where it names none, a list in ``config.json``.
    """
    path = local_path(path, _HUB_FILES)
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or directory{nearest_path(path)}")
    if is_gguf(path):
        from loopos.data.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(path)
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if _ADAPTER_FILE in names and names.isdisjoint(_VOCABULARIES):
        from loopos.models.peft_files import read_adapter_config

        return load_tokenizer(read_adapter_config(path)[1])
    directory = path if path.is_dir() else path.parent
    found = _read(path, directory)
    found.further_ends = tuple(id_ for id_ in _ends(directory) if id_ != found.eos_id)
    return found


def _read(path: Path, directory: Path) -> Tokenizer:
    config_file = directory / "tokenizer_config.json"
    config = _settings(config_file) if config_file.exists() else {}
    template = directory / _TEMPLATE_FILE
    if template.exists():  # it overrides the configuration, as in transformers
        config["chat_template"] = read_text(template, ModelFormatError)
    names = [path.name] if path.is_file() else [entry.name for entry in directory.iterdir()]
    if "tokenizer.json" in names or _is_tokenizer_json(path):
        file = path if path.is_file() else path / "tokenizer.json"
        found = Tokenizer(_from_file(file), _eos_token(config), config)
        if found.vocab_size > 2**31:
            raise ModelFormatError(f"{file}: the id {found.vocab_size - 1} does not fit 32 bits")
        return found
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if vocabulary in names or merges in names:
            return _gpt2(directory / vocabulary, directory / merges, config)
    if "vocab.txt" in names:
        return _wordpiece(directory / "vocab.txt", config)
    raise MissingFileError(
        f"{path}: no tokenizer in it (expected tokenizer.json, vocab.json with merges.txt, "
        "or vocab.txt)"
    )


def _settings(path: Path) -> dict[str, Any]:
    """Read ``tokenizer_config.json``, of which tokens and the template are text."""
    values = read_json(path, ModelFormatError)
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ModelFormatError(f"{path}: has half a surrogate pair, so no text") from error
    return values


def _ends(directory: Path) -> list[int]:
    """Return the tokens that end what a model generates, as its own files say."""
    for name in (_GENERATION_FILE, _MODEL_FILE):
        path = directory / name
        if not path.is_file():
            continue
        given = read_json(path, ModelFormatError).get("eos_token_id")
        if name == _MODEL_FILE and not isinstance(given, list):
            continue  # one token is what the tokenizer's own configuration names
        if given is None:
            continue
        ends = given if isinstance(given, list) else [given]
        for id_ in ends:
            if isinstance(id_, bool) or not isinstance(id_, int) or not 0 <= id_ < 2**31:
                raise ModelFormatError(
                    f"{path}: key 'eos_token_id' is {given!r}, expected a token id or a list"
                )
        return ends
    return []


def _is_tokenizer_json(path: Path) -> bool:
    named_vocabulary = path.name in ("vocab.json", "encoder.json")
    return path.is_file() and path.suffix == ".json" and not named_vocabulary


def _from_file(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    text = read_text(path, ModelFormatError)
    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ModelFormatError(
            f"{path}: not a tokenizer ({' '.join(str(error).split())})"
        ) from error


def _eos_token(config: dict[str, Any]) -> str | None:
    return _token(config, "eos_token")


def _token(config: dict[str, Any], name: str) -> str | None:
    token = config.get(name)
    if isinstance(token, dict):  # an AddedToken
        token = token.get("content")
    return token if isinstance(token, str) else None


def _chat_template(config: dict[str, Any]) -> str | None:
    """Return the template of ``tokenizer_config.json``, of several the one named "default"."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _gpt2(vocabulary: Path, merges: Path, config: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocab = _vocabulary(vocabulary)
    pairs = _merges(merges, vocab, vocabulary.name)
    backend = Backend(models.BPE(vocab=vocab, merges=pairs))
    prefix = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocab:
        backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, _eos_token(config), config)


def _vocabulary(path: Path) -> dict[str, int]:
    vocab = read_json(path, ModelFormatError)
    owners: dict[int, str] = {}
    for token, index in vocab.items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 2**31:
            raise ModelFormatError(f"{path}: expected an id for {token!r}, found {index!r}")
        if owners.setdefault(index, token) != token:
            raise ModelFormatError(
                f"{path}: the tokens {owners[index]!r} and {token!r} have one id, {index}"
            )
    return vocab


def _merges(path: Path, vocab: dict[str, int], beside: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(read_text(path, ModelFormatError).split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ModelFormatError(f"{path}:{number}: expected two symbols, found {line!r}")
        for symbol in (left, right, left + right):
            if symbol not in vocab:
                raise ModelFormatError(f"{path}:{number}: {symbol!r} is not in {beside}")
        pairs.append((left, right))
    return pairs


def _wordpiece(path: Path, config: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    tokens = [line.rstrip("\r") for line in read_text(path, ModelFormatError).split("\n")]
    while tokens and not tokens[-1]:
        tokens.pop()
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocab[t] != i)
        raise ModelFormatError(
            f"{path}:{vocab[twice] + 1}: token {twice!r} stands twice, "
            f"first on line {tokens.index(twice) + 1}"
        )
    for token in ("[UNK]", "[CLS]", "[SEP]"):
        if token not in vocab:
            raise ModelFormatError(f"{path}: no token {token} in it")
    backend = Backend(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    lower = bool(config.get("do_lower_case", True))
    accents = config.get("strip_accents")
    if accents is not None and not isinstance(accents, bool):
        raise ModelFormatError(
            f"{path.with_name('tokenizer_config.json')}: key 'strip_accents' is {accents!r}, "
            "expected true, false or null"
        )
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lower,
        strip_accents=accents,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(
        ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
    )
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    backend.add_special_tokens([token for token in special if token in vocab])
    return Tokenizer(backend, _eos_token(config), config)


# -- training ------------------------------------------------------------------------------------


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, individual_digits: bool = False
) -> Tokenizer:
    """Train a byte-level BPE tokenizer, GPT-2's kind, with the token ``<|endoftext|>``.

    Parameters
    ----------
    texts : iterable of str
    vocab_size : int
        At least 257: the bytes and the special token. Short texts can give fewer tokens.
    individual_digits : bool
        Each digit is a token of its own, as in Llama and Qwen: a number is then written in its
        places, which is what small models can learn to calculate with.

    Raises
    ------
    DataError
        If `vocab_size` is too small, or an entry is no text.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if isinstance(texts, str):
        raise DataError("expected a list of texts, found one text")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise DataError(
            f"a byte-level vocabulary needs {len(alphabet) + 1} tokens at least, "
            f"found vocab_size {vocab_size}"
        )
    backend = Backend(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if individual_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(_checked(texts), trainer)
    return Tokenizer(_canonical(backend))


def _canonical(backend: Any) -> Any:
    """Rebuild from its own JSON, so that a trained and a loaded tokenizer are one thing."""
    from tokenizers import Tokenizer as Backend

    return Backend.from_str(json.dumps(json.loads(backend.to_str())))
