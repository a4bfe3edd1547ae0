"""Text of generated tokens: stop strings and tokens, pieces as they come, sessions."""

from dataclasses import replace

import numpy as np
import pytest

from loopos.autograd import Tensor
from loopos.data.tokenizer import Tokenizer, train_bpe
from loopos.errors import LooposError
from loopos.generation import SamplingOptions, Session, generate, stream
from loopos.generation.text import TextTail
from loopos.models import TransformerConfig
from loopos.models.transformer import Transformer

GPT2 = TransformerConfig(
    d_model=12, num_heads=3, num_layers=2, d_ff=20, vocab_size=31, max_seq_len=96
)
TEXTS = ["the cat sat on the mat", "naïve café + 東京 🙂 déjà vu", "one two three four five six"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def speaker(tokenizer):
    """A model over the tokenizer's vocabulary."""
    return scrambled(replace(GPT2, vocab_size=tokenizer.vocab_size, max_seq_len=256), seed=2)


def scrambled(config, seed=5):
    """A model whose every parameter matters."""
    model = Transformer(config, seed=seed)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters().values():
        parameter.data += (0.3 * rng.standard_normal(parameter.shape)).astype(np.float32)
    return model


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a.prompt_index, a.sample_index) == (b.prompt_index, b.sample_index)
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert (a.stop_reason, a.text) == (b.stop_reason, b.text)


# -- where rows end ------------------------------------------------------------------------------


def test_stop_tokens_are_kept_and_not_shown(tokenizer, speaker):
    (free,) = generate(speaker, ["the"], tokenizer=tokenizer, seed=3, max_new_tokens=20)
    stop = int(free.ids[8])
    first = free.ids.tolist().index(stop)
    (found,) = generate(
        speaker, ["the"], tokenizer=tokenizer, seed=3, max_new_tokens=20, stop_ids=[stop]
    )
    assert found.stop_reason == "stop_token"
    np.testing.assert_array_equal(found.ids, free.ids[: first + 1])
    assert found.text == tokenizer.decode(free.ids[:first], skip_special_tokens=True)


def test_the_end_of_text_stops_unless_it_is_ignored(tokenizer, speaker, monkeypatch):
    (free,) = generate(speaker, [[5, 6]], seed=3, max_new_tokens=20)
    monkeypatch.setattr(tokenizer, "token_to_id", lambda _: int(free.ids[4]))
    options = SamplingOptions(seed=3, max_new_tokens=20)
    (found,) = generate(speaker, [[5, 6]], options, tokenizer=tokenizer)
    assert found.stop_reason == "stop_token"
    assert found.ids.size == free.ids.tolist().index(free.ids[4]) + 1
    (found,) = generate(speaker, [[5, 6]], options, tokenizer=tokenizer, ignore_eos=True)
    np.testing.assert_array_equal(found.ids, free.ids)


def says(tokenizer, text, monkeypatch, vocab_size=300):
    """A model that says a text whatever the prompt is: its logits are put in its place."""
    ids = tokenizer.encode(text)
    model = scrambled(replace(GPT2, vocab_size=vocab_size, max_seq_len=256))
    plan = iter(ids)

    def logits(hidden, decoding=False):
        rows = np.full((hidden.shape[0], vocab_size), -50.0, np.float32)
        rows[:, next(plan, 0)] = 50.0
        return Tensor(rows)

    monkeypatch.setattr(model, "logits", logits)
    return model, ids


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("on the",), "the cat sat "),
        (("t on",), "the cat sa"),
        (("zzz", "mat", "cat sat"), "the "),
        (("the mat + 東京 🙂 x",), None),
        (("東京 🙂",), "the cat sat on the mat + "),
        (("京",), "the cat sat on the mat + 東"),
        (("🙂",), "the cat sat on the mat + 東京 "),
    ],
)
def test_stop_strings_cut_the_text(stop, text, tokenizer, monkeypatch):
    said = "the cat sat on the mat + 東京 🙂 déjà vu"
    model, ids = says(tokenizer, said, monkeypatch)
    how = {"max_new_tokens": len(ids), "temperature": 0, "stop": stop}
    (found,) = generate(model, ["x"], tokenizer=tokenizer, **how)
    if text is None:
        assert (found.text, found.stop_reason) == (said, "length")
    else:
        assert (found.text, found.stop_reason) == (text, "stop_string")
        whole = tokenizer.decode(found.ids)
        assert any(s in whole for s in stop)
        assert not any(s in tokenizer.decode(found.ids[:-1]) for s in stop)
    model, _ = says(tokenizer, said, monkeypatch)
    pieces = list(stream(model, "x", tokenizer=tokenizer, **how))
    assert "".join(pieces) == found.text
    assert "" not in pieces


@pytest.mark.parametrize("special", [True, False])
def test_a_stop_string_can_be_a_token_of_its_own(special, tokenizer, monkeypatch):
    from tokenizers import AddedToken

    found = Tokenizer(tokenizer._backend.__class__.from_str(tokenizer._backend.to_str()))
    found._backend.add_tokens([AddedToken("<|im_end|>", special=special)])
    how = {"max_new_tokens": 30, "temperature": 0, "ignore_eos": True}
    for end in ("<|im_end|>", "<|endoftext|>"):
        model, ids = says(found, f"the cat{end} sat", monkeypatch, 301)
        (result,) = generate(model, ["x"], tokenizer=found, stop=("zzz", end), **how)
        assert (result.text, result.stop_reason) == ("the cat", "stop_token")
        assert result.ids.tolist() == ids[: ids.index(found.token_to_id(end)) + 1]
        model, _ = says(found, f"the cat{end} sat", monkeypatch, 301)
        assert "".join(stream(model, "x", tokenizer=found, stop=(end,), **how)) == "the cat"


def test_a_tokenizer_that_closes_texts_does_not_close_prompts(tokenizer, speaker):
    from tokenizers.processors import TemplateProcessing

    backend = tokenizer._backend.__class__.from_str(tokenizer._backend.to_str())
    end = "<|endoftext|>"
    backend.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_id)]
    )
    closing = Tokenizer(backend, end)
    assert closing.encode("the cat")[-1] == closing.eos_id
    texts = ["the cat", f"the cat{end}", "sat"]
    for each in (tokenizer, closing):
        assert [ids.tolist() for ids in each.encode_open(texts)] == [
            tokenizer.encode(text) for text in texts
        ]
    assert [ids.size for ids in tokenizer.encode_open([f"{end}", ""])] == [1, 0]
    how = {"temperature": 0, "max_new_tokens": 12}
    for text, ids in (
        ("the cat", tokenizer.encode("the cat")),
        (f"the cat{end}", [*tokenizer.encode("the cat"), tokenizer.eos_id]),
    ):
        (found,) = generate(speaker, [text], tokenizer=closing, **how)
        (expected,) = generate(speaker, [ids], tokenizer=closing, **how)
        np.testing.assert_array_equal(found.ids, expected.ids)


# -- text as it comes ----------------------------------------------------------------------------


def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, monkeypatch):
    said = "🙂🙂 naïve café + 東京" * 6
    model, ids = says(tokenizer, said, monkeypatch)
    pieces = list(stream(model, "x", tokenizer=tokenizer, temperature=0, max_new_tokens=len(ids)))
    assert "".join(pieces) == said
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 30


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stop", [(), ("a", "ée"), ("th",)])
def test_streams_are_what_generate_gives(seed, stop, tokenizer, speaker):
    options = SamplingOptions(max_new_tokens=60, seed=seed, stop=stop, temperature=1.2)
    (whole,) = generate(speaker, ["one two"], options, tokenizer=tokenizer)
    session = Session(speaker, tokenizer)
    assert "".join(session.stream("one two", options)) == whole.text
    assert_same([session.last], [whole])


def test_text_is_that_of_the_tokenizer():
    """Also of tokens that are no text: random ones, which are cut and joined everywhere."""
    tokenizer, rng = train_bpe(TEXTS, 300), np.random.default_rng(0)
    for _ in range(30):
        ids = rng.integers(0, tokenizer.vocab_size, 150).tolist()
        tail = TextTail(tokenizer)
        pieces = []
        for token in ids:
            tail.push(token)
            pieces.append(tail.release())
        tail.finish()
        assert "".join([*pieces, tail.release(last=True)]) == tail.text
        assert tail.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_of_a_tokenizer_with_leading_spaces_and_single_bytes():
    """Llama's first kind: a space belongs to the word behind it, other signs are bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    signs = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {"<unk>": 0} | {f"<0x{n:02X}>": n + 1 for n in range(256)}
    vocab |= {sign: 257 + n for n, sign in enumerate(signs)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    replaced = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replaced])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer = Tokenizer(backend)
    rng = np.random.default_rng(0)
    for _ in range(40):
        said = "".join(rng.choice(list("abc   é東🙂🙂🙂🙂"), 90)).strip()
        tail, pieces = TextTail(tokenizer, ("q",)), []
        for token in tokenizer.encode(said):
            tail.push(token)
            pieces.append(tail.release())
        tail.finish()
        assert "".join([*pieces, tail.release(last=True)]) == tail.text == said
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_session_goes_on_from_what_it_holds(tokenizer, speaker, monkeypatch):
    session, seen = Session(speaker, tokenizer), []
    prompt = tokenizer.encode("one two three")
    options = SamplingOptions(max_new_tokens=9, temperature=0)
    list(session.stream(prompt, options))
    answer = session.last.ids.tolist()
    assert session.held.tolist() == prompt + answer[:-1]
    inner = speaker.get_hidden_states

    def counted(batch, *args, **kwargs):
        seen.append(batch.num_tokens)
        return inner(batch, *args, **kwargs)

    monkeypatch.setattr(speaker, "get_hidden_states", counted)
    longer = prompt + answer + tokenizer.encode("five six")
    text = "".join(session.stream(longer, options))
    assert seen[0] == len(longer) - len(prompt) - len(answer) + 1
    assert text == "".join(stream(speaker, longer, options, tokenizer=tokenizer))
    shorter = prompt[:2]
    text = "".join(session.stream(shorter, options))
    assert text == "".join(stream(speaker, shorter, options, tokenizer=tokenizer))


def test_an_abandoned_or_interrupted_stream_leaves_a_sound_session(tokenizer, speaker, monkeypatch):
    session, options = Session(speaker, tokenizer), SamplingOptions(max_new_tokens=30, seed=1)
    expected = "".join(stream(speaker, "the cat", options, tokenizer=tokenizer))
    pieces = session.stream("the cat", options)
    next(pieces)
    other = session.stream("the mat", options)
    next(other)
    with pytest.raises(LooposError, match="another stream"):
        next(pieces)
    other.close()
    assert "".join(session.stream("the cat", options)) == expected
    inner, calls = speaker.get_hidden_states, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        hidden = inner(*args, **kwargs)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return hidden

    monkeypatch.setattr(speaker, "get_hidden_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(session.stream("one two three", options))
    monkeypatch.undo()
    assert "".join(session.stream("the cat", options)) == expected
    assert len(session.held) == session._cache.lengths[0]
