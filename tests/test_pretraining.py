"""Pretraining: the loss is what it says, documents stand alone, and the model is kept whole."""

import numpy as np
import pytest

from loopos.data.batch import Batch
from loopos.data.readers import Texts, read_texts, split
from loopos.data.tokenizer import Tokenizer, train_bpe
from loopos.errors import ConfigError, DataError, MissingFileError
from loopos.methods.pretraining import Options, Pretrainer
from loopos.models import Transformer, TransformerConfig, load_model
from loopos.models.adapter import LoraConfig

DOCUMENTS = [
    "The cat sat on the mat and looked at the dog, who sat on the log.",
    "The dog looked at the cat. The cat looked at the mat, and sat down again.",
    "On the mat sat the cat; on the log sat the dog, and looked, and looked.",
    "猫坐在垫子上。 🐈",
    "x",
]
TEXTS = Texts(DOCUMENTS, [f"t.jsonl:{i + 1}" for i in range(len(DOCUMENTS))])
VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(DOCUMENTS, VOCAB)


def model(seed=0, **changes):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 32, "vocab_size": VOCAB}
    return Transformer(TransformerConfig(**(sizes | {"max_seq_len": 16} | changes)), seed=seed)


def pieces_of(tokenizer, texts, length):
    """Return what documents are cut into, by another way than the method's."""
    pieces = []
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        while ids:
            piece, ids = ids[:length], ids[length:]
            if len(piece) > 1:
                pieces.append(piece)
    return pieces


def direct_loss(network, pieces):
    """Return the mean next-token loss, each piece alone, from the logits."""
    losses = []
    for piece in pieces:
        logits = network.forward(Batch.from_sequences([piece])).data.astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses += [-logs[i, piece[i + 1]] for i in range(len(piece) - 1)]
    return np.mean(losses)


def message_of(kind, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the loss --------------------------------------------------------------------------------------


def test_the_loss_starts_at_that_of_a_guess_and_falls(tokenizer):
    trainer = Pretrainer(model(), tokenizer)
    result = trainer.fit(TEXTS, learning_rate=1e-2, batch_size=4, num_epochs=40)
    losses = [record["loss"] for record in result.history]
    assert losses[0] == pytest.approx(np.log(VOCAB), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.evaluate(TEXTS)["loss"] < 0.5 * losses[0]
    assert result.steps == 40 * -(-len(pieces_of(tokenizer, DOCUMENTS, 16)) // 4)


@pytest.mark.parametrize("length", [None, 2, 5, 16])
def test_the_loss_is_the_mean_over_every_next_token(tokenizer, length):
    pieces = pieces_of(tokenizer, DOCUMENTS, length or 16)
    assert len(pieces) > len(DOCUMENTS)
    expected = direct_loss(model(), pieces)
    trainer = Pretrainer(model(), tokenizer)
    found = trainer.evaluate(TEXTS, Options(sequence_length=length))
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]), rel=1e-12)
    # One step over everything, and the same in four parts.
    whole = trainer.fit(TEXTS, batch_size=1000, max_steps=1, sequence_length=length)
    assert whole.history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert whole.history[0]["tokens"] == sum(map(len, pieces))
    parts = Pretrainer(model(), tokenizer).fit(
        TEXTS, batch_size=-(-len(pieces) // 4), max_steps=1, sequence_length=length,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    assert parts.history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_loss_equals_that_of_the_model(tokenizer):
    network = model(seed=3)
    batch = Batch.from_sequences(pieces_of(tokenizer, DOCUMENTS, 16))
    total, count = network.next_token_loss(batch)
    assert count == sum(len(piece) - 1 for piece in pieces_of(tokenizer, DOCUMENTS, 16))
    found = Pretrainer(network, tokenizer).evaluate(TEXTS)["loss"]
    assert found == pytest.approx(total.item() / count, rel=1e-6)


def test_the_sequence_length_changes_the_result(tokenizer):
    losses = {n: Pretrainer(model(), tokenizer).evaluate(TEXTS, Options(sequence_length=n))["loss"]
              for n in (4, 8, 16)}  # fmt: skip
    assert len(set(losses.values())) == 3
    trained = [Pretrainer(model(), tokenizer) for _ in range(2)]
    for trainer, length in zip(trained, (4, 16), strict=True):
        trainer.fit(TEXTS, max_steps=2, sequence_length=length)
    first, second = (trainer.model.head_weight.data for trainer in trained)
    assert not np.array_equal(first, second)


def test_documents_do_not_see_each_other(tokenizer):
    trainer = Pretrainer(model(seed=1), tokenizer)
    alone = [trainer.evaluate(TEXTS.take([i])) for i in range(len(DOCUMENTS))]
    counts = [
        sum(len(piece) - 1 for piece in pieces_of(tokenizer, [text], 16)) for text in DOCUMENTS
    ]
    expected = np.average([found["loss"] for found in alone], weights=counts)
    assert trainer.evaluate(TEXTS)["loss"] == pytest.approx(expected, rel=1e-6)
    backwards = trainer.evaluate(TEXTS.take(range(len(DOCUMENTS))[::-1]))
    assert backwards["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("length", [2, 3, 7, 16])
def test_pieces_are_documents_cut_and_never_joined(tokenizer, length):
    trainer = Pretrainer(model(), tokenizer)
    pieces = trainer._pieces(TEXTS, Options(sequence_length=length))
    assert [piece.tolist() for piece in pieces] == pieces_of(tokenizer, DOCUMENTS, length)
    assert all(2 <= len(piece) <= length for piece in pieces)
    assert all(tokenizer.eos_id not in piece[:-1] for piece in pieces)


def test_a_very_long_document_is_read_whole(tokenizer):
    text = "the cat sat on the mat " * 2000
    [found] = [Pretrainer(model(), tokenizer)._pieces(Texts([text], ["row 1"]), Options())]
    ids = np.concatenate(found)
    assert tokenizer.decode(ids[:-1]) == text
    assert ids[-1] == tokenizer.eos_id


def test_a_fraction_of_the_texts_or_of_the_only_one_is_held_out(tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text("The cat sat on the mat.\nThe dog sat on the log.\n" * 40)
    for data in (tmp_path / "one.txt", TEXTS):
        trainer = Pretrainer(model(), tokenizer, seed=3)
        result = trainer.fit(data, validation_fraction=0.25, max_steps=2)
        whole = read_texts(data) if data is not TEXTS else data
        training, validation = split(whole, 0.25, seed=3)
        other = Pretrainer(model(), tokenizer, seed=3)
        expected = other.fit(training, validation, max_steps=2)
        assert result.evaluations[-1]["eval"] == expected.evaluations[-1]["eval"]
        assert result.history[-1]["loss"] == expected.history[-1]["loss"]
        # Validation data that is there counts.
        third = Pretrainer(model(), tokenizer, seed=3)
        third.fit(training, validation, max_steps=2, validation_fraction=0.5)
        assert third.evaluate(validation) == other.evaluate(validation)
    assert Pretrainer(model(), tokenizer).fit(TEXTS, max_steps=1).evaluations == []


def words(template=None):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors

    backend = Backend(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<end>", 2)]
        )
    return backend


def test_the_end_of_a_document_is_learned_once():
    texts = Texts(["a b a"], ["row 1"])
    for backend, end, expected in (
        (words(), None, [0, 1, 0]),
        (words(), "<end>", [0, 1, 0, 2]),
        (words("$A <end>"), "<end>", [0, 1, 0, 2]),
    ):
        trainer = Pretrainer(model(vocab_size=4), Tokenizer(backend, end))
        [piece] = trainer._pieces(texts, Options())
        assert piece.tolist() == expected


# -- data ------------------------------------------------------------------------------------------


def test_data_may_be_files(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\f".join(DOCUMENTS), encoding="utf-8")
    trainer = Pretrainer(model(), tokenizer)
    assert trainer.evaluate(path) == trainer.evaluate(TEXTS)
    result = trainer.fit(str(path), path, max_steps=1)
    assert result.evaluations[0]["eval"] == trainer.evaluate(read_texts(path))
    missing = tmp_path / "u.txt"
    expected = f"{missing}: no such file; did you mean 't.txt'?"
    assert message_of(MissingFileError, trainer.fit, missing) == expected


def test_a_text_of_one_token_has_nothing_to_predict():
    trainer = Pretrainer(model(vocab_size=4), Tokenizer(words()))
    expected = "no text has two tokens, so there is nothing to predict"
    assert message_of(DataError, trainer.fit, Texts(["a", "b"], ["row 1", "row 2"])) == expected


def test_the_report_has_whole_documents(tokenizer):
    report = Pretrainer(model(), tokenizer).report(TEXTS, TEXTS.take([0]))
    lengths = [len(tokenizer.encode(text)) for text in DOCUMENTS]
    assert (report.tokens, report.lengths["max"]) == (sum(lengths), max(lengths))
    assert (report.rows, report.validation_rows, report.max_length) == (5, 1, None)
    assert report.truncated.count == 0
    assert report.leaks.places == ["t.jsonl:1"]


# -- what does not fit -----------------------------------------------------------------------------


def test_a_model_that_cannot_speak_is_refused(tokenizer):
    expected = "pretraining needs a causal model with a language-model head"
    for changes in ({"causal": False}, {"lm_head": False, "tied": False}):
        assert message_of(ConfigError, Pretrainer, model(**changes), tokenizer) == expected
    found = message_of(ConfigError, Pretrainer, model(vocab_size=100), tokenizer)
    assert (
        found
        == f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab_size 100"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sequence_length": 1}, "training.sequence_length: expected at least 2, found 1"),
        (
            {"sequence_length": 17},
            "training.sequence_length: 17 is more than the model's max_seq_len 16",
        ),
        ({"sequence_len": 4}, "unknown option 'sequence_len'; did you mean 'sequence_length'?"),
    ],
)
def test_options_that_do_not_fit_are_named(tokenizer, overrides, message):
    trainer = Pretrainer(model(), tokenizer)
    assert message_of(ConfigError, trainer.fit, TEXTS, **overrides) == message


# -- keeping ---------------------------------------------------------------------------------------


def test_what_is_evaluated_has_its_adapters(tokenizer, tmp_path):
    model().save(tmp_path)
    trainer = Pretrainer(load_model(tmp_path), tokenizer)
    before = trainer.evaluate(TEXTS)["loss"]
    result = trainer.fit(TEXTS, TEXTS, learning_rate=1e-2, max_steps=8, eval_steps=4,
                         lora=LoraConfig(rank=2))  # fmt: skip
    first, last = (e["eval"]["loss"] for e in result.evaluations)
    assert last < first < before
    assert trainer.evaluate(TEXTS)["loss"] == last


def test_the_best_weights_are_in_place_at_the_end(tokenizer, tmp_path):
    # Trained on one document, it soon does worse on the others.
    trainer = Pretrainer(model(), tokenizer)
    result = trainer.fit(
        TEXTS.take([0]), TEXTS.take([1, 2, 3]), output_dir=tmp_path, learning_rate=2e-2,
        batch_size=4, num_epochs=25,
    )  # fmt: skip
    losses = [record["eval"]["loss"] for record in result.evaluations]
    assert losses[-1] > min(losses)
    assert trainer.evaluate(TEXTS.take([1, 2, 3]))["loss"] == min(losses)


def test_what_was_saved_is_read_back(tokenizer, tmp_path):
    trainer = Pretrainer(model(), tokenizer)
    trainer.fit(TEXTS, max_steps=3)
    trainer.save(tmp_path)
    again = Pretrainer(load_model(tmp_path), tokenizer)
    assert again.evaluate(TEXTS) == trainer.evaluate(TEXTS)


def test_transformers_reads_what_was_saved(tokenizer, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    trainer = Pretrainer(model(), tokenizer)
    trainer.fit(TEXTS, max_steps=3)
    trainer.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(DOCUMENTS[3])["input_ids"][:16]
    assert ids == tokenizer.encode(DOCUMENTS[3])[:16]
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
    found = trainer.model.forward(Batch.from_sequences([ids])).data
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_text_of_which_a_tokenizer_keeps_nothing_is_passed_over():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    # Without bytes to fall back on, and without an unknown token.
    backend = Backend(models.BPE({"a": 0, "b": 1, "<end>": 2}, []))
    words = Tokenizer(backend, "<end>")
    sizes = {"d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 8, "vocab_size": 3}
    trainer = Pretrainer(Transformer(TransformerConfig(**sizes)), words)
    both, one = (Texts(texts, [f"row {i}" for i in range(len(texts))])
                 for texts in (["ab", "五"], ["ab"]))  # fmt: skip
    assert trainer.evaluate(both) == trainer.evaluate(one)
