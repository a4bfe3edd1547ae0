"""Tokenizers in GGUF files, rebuilt for the `tokenizers` library from the metadata.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer". How text is split
before the merges is named by ``tokenizer.ggml.pre``; the expressions are those that the models'
own ``tokenizer.json`` files publish.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopos.data.tokenizer import Tokenizer
from loopos.errors import ModelFormatError, nearest
from loopos.models.gguf_file import GgufFile

__all__ = ["load_gguf_tokenizer"]

_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_SCORES, _MERGES = "tokenizer.ggml.scores", "tokenizer.ggml.merges"
#: Kinds of tokens in the file.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|\p{N}" + _REST
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What llama.cpp computes for "default", which is nearer to Falcon's splitting than to GPT-2's.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class _Splitting:
    """How text becomes words: each expression splits the pieces that the ones before left."""

    expressions: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False  # where the file does not say


_SPLITTINGS = {
    "gpt-2": _Splitting((_GPT2,)),
    "default": _Splitting(_DEFAULT),
    "smollm": _Splitting((r"\p{N}", _GPT2)),
    "llama-bpe": _Splitting((_LLAMA3,), ignore_merges=True, add_bos=True),
    "qwen2": _Splitting((_QWEN2,), nfc=True),
}
_SPLITTINGS |= {"llama3": _SPLITTINGS["llama-bpe"], "llama-v3": _SPLITTINGS["llama-bpe"]}


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer and the chat template of a GGUF file.

    Parameters
    ----------
    path : path
        With ``tokenizer.ggml.model`` "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).

    Returns
    -------
    Tokenizer
        `encode` adds the tokens at the beginning and the end that the file asks for.

    Raises
    ------
    MissingFileError
        If there is no such file.
    ModelFormatError
        If it is damaged, has no tokenizer, or splits text in a way that loopos does not know.
    """
    file = GgufFile(path)
    makers: dict[str, Callable[[GgufFile, list[str]], tuple[Any, bool]]] = {
        "gpt2": _byte_level,
        "llama": _sentencepiece,
    }
    model = file.require("tokenizer.ggml.model", str)
    if model not in makers:
        raise _fault(file, f"key 'tokenizer.ggml.model' is {model!r}, expected 'gpt2' or 'llama'")
    tokens = _tokens(file)
    backend, add_bos = makers[model](file, tokens)
    _add_special_tokens(backend, file, tokens)
    names = {f"{name}_token": _special(file, tokens, name) for name in ("bos", "eos", "unk", "pad")}
    _add_ends(backend, file, names, add_bos)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: token for key, token in names.items() if token is not None},
    }
    template = file.get("tokenizer.chat_template", str)
    if template is not None:
        config["chat_template"] = template
    architecture = file.get("general.architecture", str)
    length = file.get(f"{architecture}.context_length", int)
    if length is not None:
        config["model_max_length"] = length
    return Tokenizer(backend, names["eos_token"], config)


def _fault(file: GgufFile, text: str) -> ModelFormatError:
    return ModelFormatError(f"{file.path}: {text}")


def _tokens(file: GgufFile) -> list[str]:
    tokens: list[str] = file.require(_TOKENS, list)
    if not tokens:
        raise _fault(file, f"key '{_TOKENS}' is empty")
    if len(set(tokens)) != len(tokens):
        owners: dict[str, int] = {}
        for index, token in enumerate(tokens):
            if owners.setdefault(token, index) != index:
                raise _fault(
                    file, f"key '{_TOKENS}': {token!r} stands at {owners[token]} and at {index}"
                )
    return tokens


def _types(file: GgufFile, count: int) -> np.ndarray[Any, Any]:
    types = file.get(_TYPES, np.ndarray)
    if types is None:
        return np.full(count, _NORMAL)
    if len(types) != count:
        raise _fault(file, f"key '{_TYPES}' has {len(types)} entries for {count} tokens")
    found: np.ndarray[Any, Any] = types
    return found


def _special(file: GgufFile, tokens: list[str], name: str) -> str | None:
    """Return the token with a role of its own, None if there is none."""
    key = {"unk": "unknown", "pad": "padding"}.get(name, name)
    index = file.get(f"tokenizer.ggml.{key}_token_id", int)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise _fault(
            file, f"key 'tokenizer.ggml.{key}_token_id' is {index}, expected 0 to {len(tokens) - 1}"
        )
    return tokens[index]


def _add_special_tokens(backend: Any, file: GgufFile, tokens: list[str]) -> None:
    """Tell the library which tokens stand for themselves in a text, before it is split."""
    from tokenizers import AddedToken

    kinds = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    added = []
    for token, kind in zip(tokens, _types(file, len(tokens)).tolist(), strict=True):
        if kind in kinds and token:
            added.append(AddedToken(token, special=kinds[kind], normalized=False))
    # All in one call: `add_special_tokens` would make each of them special.
    backend.add_tokens(added)


def _add_ends(backend: Any, file: GgufFile, names: dict[str, str | None], add_bos: bool) -> None:
    """Have the tokens of beginning and end added to a text where the file says so."""
    from tokenizers import processors

    template, ids = ["$A"], []
    for name, default in (("bos", add_bos), ("eos", False)):
        key = f"tokenizer.ggml.add_{name}_token"
        token = names[f"{name}_token"]
        if not file.get(key, bool, default):
            continue
        if token is None:
            raise _fault(file, f"key 'tokenizer.ggml.{name}_token_id' is missing, which is added")
        template = [name, *template] if name == "bos" else [*template, name]
        # By another name than its own, in which a colon or a dollar would mean something.
        ids.append({"id": name, "ids": [backend.token_to_id(token)], "tokens": [token]})
    if ids:
        pair = [*template, *(part.replace("$A", "$B") + ":1" for part in template)]
        backend.post_processor = processors.TemplateProcessing(
            single=template, pair=pair, special_tokens=ids
        )


# -- byte-level BPE --------------------------------------------------------------------------------


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[Any, bool]:
    """Return GPT-2's kind of tokenizer, and whether it begins a text with a token by default."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    name = file.require("tokenizer.ggml.pre", str)
    if name not in _SPLITTINGS:
        raise _fault(
            file,
            f"key 'tokenizer.ggml.pre' is {name!r}, expected one of {', '.join(_SPLITTINGS)}"
            + nearest(name, _SPLITTINGS),
        )
    how = _SPLITTINGS[name]
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = _merges(file, vocab)
    backend = Backend(BPE(vocab=vocab, merges=pairs, ignore_merges=how.ignore_merges))
    if how.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(text), "isolated") for text in how.expressions]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    backend.decoder = decoders.ByteLevel()
    return backend, how.add_bos


def _merges(file: GgufFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for index, line in enumerate(file.require(_MERGES, list)):
        # A symbol may hold a space of its own only in vocabularies that are not byte-level.
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise _fault(file, f"key '{_MERGES}', entry {index}: expected two, found {line!r}")
        for symbol in (left, right, left + right):
            if symbol not in vocab:
                raise _fault(file, f"key '{_MERGES}', entry {index}: {symbol!r} is not a token")
        pairs.append((left, right))
    return pairs


# -- SentencePiece ---------------------------------------------------------------------------------

_SPACE = "\u2581"
#: Characters of a token, at the most: the search for its two halves takes time with the length.
_LONGEST = 512


def _sentencepiece(file: GgufFile, tokens: list[str]) -> tuple[Any, bool]:
    """Return Llama's kind of tokenizer, and whether it begins a text with a token by default.

    The merges follow from the scores: two tokens whose union is a token are merged, the better the
    score of the union the earlier. What no token covers becomes tokens of bytes.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, normalizers
    from tokenizers.models import BPE

    types = _types(file, len(tokens))
    scores = file.require(_SCORES, np.ndarray)
    if len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise _fault(file, f"key '{_SCORES}': expected {len(tokens)} finite numbers")
    unknown = _special(file, tokens, "unk")
    if unknown is None:
        candidates = np.flatnonzero(types == _UNKNOWN)
        unknown = tokens[candidates[0]] if len(candidates) else None
    bytes_ = {f"<0x{value:02X}>" for value in range(256)}
    fallback = bytes_ <= set(tokens)
    vocab = {token: index for index, token in enumerate(tokens)}
    longest = max(tokens, key=len)
    if len(longest) > _LONGEST:
        raise _fault(file, f"key '{_TOKENS}' has a token of {len(longest)} characters")
    pairs = _merges_by_score(tokens, types, scores, vocab)
    backend = Backend(
        BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", _SPACE)
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, spaces])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return backend, True


def _merges_by_score(
    tokens: list[str],
    types: np.ndarray[Any, Any],
    scores: np.ndarray[Any, Any],
    vocab: dict[str, int],
) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece vocabulary, the first to be done first."""
    normal = set(np.flatnonzero(types == _NORMAL).tolist())
    found = []
    for index in sorted(normal):
        token = tokens[index]
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left in normal and right in normal:
                found.append((-float(scores[index]), index, left, right))
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(found)]
