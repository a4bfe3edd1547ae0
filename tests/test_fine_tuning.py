"""Fine-tuning: what is learned, what each option changes, and what is refused."""

import itertools
import json

import numpy as np
import pytest

import loopos
from loopos.data.batch import Batch
from loopos.data.readers import LabelledTexts, read_labelled
from loopos.data.tokenizer import Tokenizer, train_bpe
from loopos.errors import ConfigError, DataError
from loopos.methods.fine_tuning import FineTuner, Options, Predictions
from loopos.models import SequenceClassifier, Transformer, TransformerConfig

GOOD = ["a wonderful", "a charming", "a lovely", "an excellent", "a superb"]
BAD = ["a dreadful", "a boring", "a terrible", "an awful", "a clumsy"]
THINGS = ["little film", "story of two friends", "evening", "book, I think", "performance 🎬"]
ROWS = [
    {"text": f"{word} {thing}", "label": label}
    for label, words in (("praise", GOOD), ("blame", BAD))
    for word, thing in itertools.product(words, THINGS)
]
HELD_OUT = [
    {"text": f"{word} film, {word} story", "label": label}
    for label, words in (("praise", GOOD), ("blame", BAD))
    for word in words
]
FAST = Options(learning_rate=3e-3, batch_size=10, num_epochs=1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([row["text"] for row in ROWS], 320)


def body(seed=0, **changes):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 3, "d_ff": 32, "vocab_size": 320}
    return Transformer(TransformerConfig(**(sizes | {"max_seq_len": 48} | changes)), seed=seed)


def values(tuner):
    return {name: p.data.copy() for name, p in tuner.classifier.parameters().items()}


def changed(tuner, before):
    return {name for name, p in values(tuner).items() if not np.array_equal(p, before[name])}


def message_of(kind, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def learned(tokenizer):
    tuner = FineTuner(body(), tokenizer)
    result = tuner.fit(ROWS, HELD_OUT, FAST, num_epochs=12)
    return tuner, result


# -- learning --------------------------------------------------------------------------------------


def test_a_separable_task_of_words_is_learned(learned):
    tuner, result = learned
    assert (result.steps, result.stopped_reason) == (60, "finished")
    assert result.history[0]["loss"] == pytest.approx(np.log(2), abs=0.05)
    assert result.history[-1]["loss"] < 0.05
    assert len(result.evaluations) == 12
    assert result.evaluations[-1]["eval"]["accuracy"] == 1.0
    assert tuner.evaluate(ROWS)["accuracy"] == 1.0
    assert tuner.label_names == ["blame", "praise"]
    found = tuner.predict(["a superb little story", "an awful evening, a boring book"])
    assert found.labels == ["praise", "blame"]
    assert found.ids.tolist() == [1, 0]


def test_the_same_seed_gives_the_same_and_another_another(tokenizer):
    first, second, third = (FineTuner(body(), tokenizer, seed=seed) for seed in (0, 0, 1))
    losses = [
        [r["loss"] for r in t.fit(ROWS, options=FAST).history] for t in (first, second, third)
    ]
    assert losses[0] == losses[1] != losses[2]
    for name, value in values(first).items():
        np.testing.assert_array_equal(value, values(second)[name])


# -- predicting ------------------------------------------------------------------------------------


def test_probabilities_do_not_depend_on_the_batch_or_the_order(learned):
    tuner, _ = learned
    texts = [row["text"] * (1 + i % 4) for i, row in enumerate(ROWS)] + ["x", "今天", "שלום 🎉"]
    whole = tuner.predict(texts)
    assert isinstance(whole, Predictions)
    assert whole.probabilities.shape == (len(texts), 2)
    np.testing.assert_allclose(whole.probabilities.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(whole.ids, whole.probabilities.argmax(axis=1))
    for batch_tokens in (1, 50, 10**6):
        found = tuner.predict(texts, batch_tokens)
        np.testing.assert_allclose(found.probabilities, whole.probabilities, atol=1e-6)
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = tuner.predict([texts[i] for i in order])
    np.testing.assert_allclose(shuffled.probabilities, whole.probabilities[order], atol=1e-6)
    alone = np.concatenate([tuner.predict([text]).probabilities for text in texts])
    np.testing.assert_allclose(alone, whole.probabilities, atol=1e-6)


def test_probabilities_are_the_softmax_of_the_logits(learned, tokenizer):
    tuner, _ = learned
    text = "a lovely terrible evening"
    [logits] = tuner.classifier.logits(Batch.from_sequences([tokenizer.encode(text)])).data
    expected = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    np.testing.assert_allclose(tuner.predict([text]).probabilities, [expected], rtol=1e-6)


def test_extreme_logits_give_probabilities(tokenizer):
    tuner = FineTuner(body(), tokenizer, num_classes=2)
    tuner.classifier.bias.data[:] = [-3000, -5000]
    np.testing.assert_array_equal(tuner.predict(["a"]).probabilities, [[1.0, 0.0]])


def test_long_texts_are_cut_and_no_texts_are_none(learned, tokenizer):
    tuner, _ = learned
    text = "a lovely film " * 10_000
    cut = tokenizer.decode(tokenizer.encode(text)[:48])
    np.testing.assert_array_equal(
        tuner.predict([text]).probabilities, tuner.predict([cut]).probabilities
    )
    nothing = tuner.predict([])
    assert nothing.probabilities.shape == (0, 2)
    assert (nothing.ids.tolist(), nothing.labels) == ([], [])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a film", "predict() takes a list of texts, found one string"),
        (["a", 3], "text 1: expected a string, found int"),
        (["a", None], "text 1: expected a string, found NoneType"),
        (["a", " \n"], "text 1: there is nothing in it"),
        (["\ud800"], "text 0: has half a surrogate pair, so no text"),
    ],
)
def test_what_cannot_be_predicted_is_named(learned, texts, message):
    assert message_of(DataError, learned[0].predict, texts) == message


def test_a_text_without_a_token_is_named():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tuner = FineTuner(body(vocab_size=2), Tokenizer(backend))
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(["a", "b", "z", "a b"])]
    expected = "row 3: the tokenizer finds no token in this text"
    assert message_of(DataError, tuner.fit, rows) == expected
    tuner.fit(rows[:2])
    expected = "text 1: the tokenizer finds no token in this text"
    assert message_of(DataError, tuner.predict, ["a", "z"]) == expected


# -- evaluating ------------------------------------------------------------------------------------


def test_evaluation_equals_its_definition(tokenizer):
    tuner = FineTuner(body(), tokenizer, num_classes=3, seed=3)
    tuner.classifier.weight.data *= 100
    texts = [row["text"] for row in ROWS]
    labels = np.random.default_rng(0).integers(0, 3, len(texts))
    rows = [{"text": t, "label": int(k)} for t, k in zip(texts, labels, strict=True)]
    found = tuner.evaluate(rows)
    predicted = tuner.predict(texts)
    picked = predicted.probabilities[np.arange(len(texts)), labels]
    assert found["loss"] == pytest.approx(-np.log(picked).mean(), rel=1e-5)
    assert found["accuracy"] == (predicted.ids == labels).mean()
    assert found["count"] == len(texts)
    matrix = np.zeros((3, 3), int)
    for label, guess in zip(labels, predicted.ids, strict=True):
        matrix[label, guess] += 1
    assert found["confusion_matrix"] == matrix.tolist()
    recall = [matrix[k, k] / matrix[k].sum() for k in range(3)]
    assert found["recall_macro"] == pytest.approx(np.mean(recall))


def test_labels_are_matched_by_name(learned):
    tuner, _ = learned
    # On their own these rows would number "praise" as class 0.
    praise = [row for row in HELD_OUT if row["label"] == "praise"]
    assert tuner.evaluate(praise)["accuracy"] == 1.0
    other = [*praise, {"text": "a clumsy film", "label": "zzz"}]
    data = read_labelled(other)
    assert data.label_names == ["praise", "zzz"]
    assert tuner.evaluate(data.take(range(5)))["accuracy"] == 1.0
    expected = "row 6: unknown 'label' 'zzz' (known: blame, praise)"
    assert message_of(DataError, tuner.evaluate, data) == expected
    assert message_of(DataError, tuner.evaluate, other) == expected


# -- options ---------------------------------------------------------------------------------------


def first_loss(tokenizer, rows=ROWS, num_classes=None, **overrides):
    """Return the loss of one step over all rows, before any weight has changed, and the tuner."""
    tuner = FineTuner(body(), tokenizer, num_classes=num_classes, seed=5)
    options = {"batch_size": len(rows), "max_steps": 1} | overrides
    return tuner.fit(rows, **options).history[0]["loss"], tuner


def negative_logs(tokenizer, rows=ROWS, num_classes=2, max_length=None):
    """Return -log p of every class for every row, float64 [n, K], of the untrained tuner."""
    classifier = SequenceClassifier(body(), num_classes, seed=5)
    batch = Batch.from_sequences([tokenizer.encode(row["text"], max_length) for row in rows])
    logits = classifier.logits(batch).data.astype(np.float64)
    return np.log(np.exp(logits).sum(axis=1, keepdims=True)) - logits


LABELS = np.array([int(row["label"] == "praise") for row in ROWS])
UNEVEN = ROWS[:25] + ROWS[25:30]
UNEVEN_LABELS = np.array([1] * 25 + [0] * 5)


def test_the_loss_is_the_mean_cross_entropy(tokenizer):
    losses = negative_logs(tokenizer)[np.arange(len(ROWS)), LABELS]
    assert first_loss(tokenizer)[0] == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("weights", ["balanced", [3.0, 0.5]])
def test_class_weights_weigh_the_mean(tokenizer, weights):
    losses = negative_logs(tokenizer, UNEVEN)[np.arange(30), UNEVEN_LABELS]
    per_class = np.array([30 / (2 * 5), 30 / (2 * 25)] if weights == "balanced" else weights)
    expected = np.average(losses, weights=per_class[UNEVEN_LABELS])
    found, _ = first_loss(tokenizer, UNEVEN, class_weights=weights)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(losses.mean(), rel=1e-5)


def test_a_class_without_rows_has_no_balanced_weight(tokenizer):
    losses = negative_logs(tokenizer, UNEVEN, 3)[np.arange(30), UNEVEN_LABELS]
    rows = [
        {"text": r["text"], "label": int(k)} for r, k in zip(UNEVEN, UNEVEN_LABELS, strict=True)
    ]
    expected = np.average(losses, weights=np.array([30 / (3 * 5), 30 / (3 * 25)])[UNEVEN_LABELS])
    found, _ = first_loss(tokenizer, rows, num_classes=3, class_weights="balanced")
    assert found == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_spreads_the_target(tokenizer):
    logs = negative_logs(tokenizer)
    expected = (0.7 * logs[np.arange(len(ROWS)), LABELS] + 0.3 * logs.mean(axis=1)).mean()
    assert first_loss(tokenizer, label_smoothing=0.3)[0] == pytest.approx(expected, rel=1e-5)


def test_max_length_cuts_the_texts_and_is_kept(tokenizer, tmp_path):
    losses = negative_logs(tokenizer, max_length=3)[np.arange(len(ROWS)), LABELS]
    found, tuner = first_loss(tokenizer, max_length=3)
    assert found == pytest.approx(losses.mean(), rel=1e-5)
    assert found != pytest.approx(first_loss(tokenizer)[0], rel=1e-5)
    whole, cut = tuner.evaluate(ROWS, Options()), tuner.evaluate(ROWS)
    assert whole["loss"] != cut["loss"]
    tuner.save(tmp_path)
    loaded = FineTuner.load(tmp_path)
    assert loaded.evaluate(ROWS) == cut == tuner.evaluate(ROWS, Options(max_length=3))
    # Files from before have no such key, and mean all that the body takes.
    path = tmp_path / "classifier.json"
    values = json.loads(path.read_text())
    assert values.pop("max_length") == 3
    path.write_text(json.dumps(values))
    assert FineTuner.load(tmp_path).evaluate(ROWS) == whole


def test_pooling_is_taken_kept_and_saved(tokenizer, tmp_path):
    losses = {p: first_loss(tokenizer, pooling=p)[0] for p in ("mean", "last", "cls", None)}
    assert losses[None] == losses["mean"]
    assert len({losses[p] for p in ("mean", "last", "cls")}) == 3
    tuner = first_loss(tokenizer, pooling="last")[1]
    assert tuner.classifier.pooling == "last"
    tuner.fit(ROWS, max_steps=1)
    assert tuner.classifier.pooling == "last"
    tuner.save(tmp_path)
    assert FineTuner.load(tmp_path).classifier.pooling == "last"


HEAD = {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        ("all", lambda name: True),
        ("head", lambda name: name in HEAD),
        (1, lambda name: name in HEAD or name.startswith(("layers.2.", "final_norm."))),
        (2, lambda name: name.startswith(("classifier.", "layers.1.", "layers.2.", "final_norm."))),
        (3, lambda name: name in HEAD or name.startswith(("layers.", "final_norm."))),
    ],
)
def test_exactly_the_asked_weights_are_trained(tokenizer, train, wanted):
    tuner = FineTuner(body(), tokenizer, num_classes=2)
    before = values(tuner)
    for name in before:
        if "attention.k.bias" in name:  # has no gradient: softmax ignores what all scores share
            tuner.classifier.parameters()[name].data[:] = 0
            before[name][:] = 0
    tuner.fit(ROWS, train=train, max_steps=2, batch_size=25, weight_decay=0.0)
    expected = {name for name in before if wanted(name)}
    maybe = {name for name in expected if "attention.k.bias" in name}
    assert changed(tuner, before) - maybe == expected - maybe
    # What was frozen is free again for the next run.
    tuner.fit(ROWS, max_steps=1, batch_size=50)
    assert changed(tuner, before) >= set(before) - {n for n in before if "k.bias" in n}


def test_a_language_model_head_is_left_alone(tokenizer):
    tuner = FineTuner(body(tied=False), tokenizer, num_classes=2)
    assert "lm_head.weight" not in tuner.classifier.parameters()
    before = tuner.body.parameters()["lm_head.weight"].data.copy()
    tuner.fit(ROWS, max_steps=1)
    np.testing.assert_array_equal(tuner.body.parameters()["lm_head.weight"].data, before)


LAYERS = "training.train: expected 'all', 'head' or a number of layers, found "
WEIGHTS = "training.class_weights: expected 'balanced' or a number for each class, found "
NEGATIVE = "training.class_weights: expected numbers that are not negative"
POOLINGS = "training.pooling: expected one of mean, last, cls, found "


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learning_rat": 1}, "unknown option 'learning_rat'; did you mean 'learning_rate'?"),
        ({"poolings": "cls"}, "unknown option 'poolings'; did you mean 'pooling'?"),
        ({"pooling": "maen"}, POOLINGS + "'maen'; did you mean 'mean'?"),
        ({"train": "heads"}, LAYERS + "'heads'"),
        ({"train": 0}, LAYERS + "0"),
        ({"train": True}, LAYERS + "True"),
        ({"train": 4}, "training.train: 4 layers asked for, the model has 3"),
        ({"class_weights": "even"}, WEIGHTS + "'even'"),
        ({"class_weights": [1.0]}, "training.class_weights: 1 numbers for 2 classes"),
        ({"class_weights": [1.0, -1.0]}, NEGATIVE),
        ({"class_weights": [1.0, float("nan")]}, NEGATIVE),
        (
            {"label_smoothing": 1.0},
            "training.label_smoothing: expected a number in [0, 1), found 1.0",
        ),
        ({"max_length": 0}, "training.max_length: expected at least 1, found 0"),
        ({"max_length": 49}, "training.max_length: 49 is more than the model's max_seq_len 48"),
    ],
)
def test_options_that_do_not_fit_are_named(tokenizer, overrides, message):
    tuner = FineTuner(body(), tokenizer)
    assert message_of(ConfigError, tuner.fit, ROWS, **overrides) == message


# -- classes ---------------------------------------------------------------------------------------


def test_a_tuner_without_a_head_says_so(tokenizer):
    tuner = FineTuner(body(), tokenizer)
    expected = "this classifier has no head yet: give num_classes or call fit()"
    for use in (tuner.predict, tuner.evaluate):
        data = ["a"] if use == tuner.predict else ROWS
        assert message_of(ConfigError, use, data) == expected


def test_more_classes_than_the_head_has_are_refused(tokenizer):
    tuner = FineTuner(body(), tokenizer, num_classes=2)
    rows = [{"text": f"t{i}", "label": i} for i in range(3)]
    expected = "row 3: label 2 is outside the 2 classes"
    assert message_of(DataError, tuner.fit, rows) == expected
    data = LabelledTexts(["a", "b"], ["row 1", "row 2"], np.array([0, 1]), ["a", "b", "c"])
    expected = "num_classes is 2 but the data names 3"
    assert message_of(ConfigError, tuner.fit, data) == expected
    expected = "num_classes is 3 but 2 labels are named"
    found = message_of(ConfigError, FineTuner, body(), tokenizer, num_classes=3, label_names="ab")
    assert found == expected
    assert message_of(ConfigError, FineTuner, body(), tokenizer, num_classes=0) == (
        "num_classes is 0, expected at least 1"
    )


def test_one_class_alone_is_refused(tokenizer):
    expected = "row 1: every row has the 'label' 'praise', expected two classes at least"
    assert message_of(DataError, FineTuner(body(), tokenizer).fit, ROWS[:5]) == expected
    tuner = FineTuner(body(), tokenizer, label_names=["blame", "praise"])
    expected = "row 1: every row has the class 'praise', expected two classes at least"
    assert message_of(DataError, tuner.fit, ROWS[:5]) == expected


def test_given_names_order_the_classes(tokenizer):
    tuner = FineTuner(body(), tokenizer, label_names=["praise", "none", "blame"])
    tuner.fit(ROWS, HELD_OUT[:5], max_steps=1)
    assert tuner.classifier.num_classes == 3
    assert tuner.classifier.labels == ["praise", "none", "blame"]
    assert tuner.evaluate(ROWS)["per_class"]["support"] == [25, 0, 25]
    numbered = [{"text": row["text"], "label": int(k)} for row, k in zip(ROWS, LABELS, strict=True)]
    named = FineTuner(body(), tokenizer, label_names=["blame", "praise"])
    named.fit(numbered, max_steps=1)
    assert set(named.predict(["a", "b"]).labels) <= {"blame", "praise"}


def test_classes_that_the_data_does_not_show_have_numbers(tokenizer):
    tuner = FineTuner(body(), tokenizer, num_classes=4)
    tuner.fit(ROWS, HELD_OUT[5:], max_steps=1)
    assert tuner.label_names == ["blame", "praise", "class 2", "class 3"]
    # The validation rows alone would have numbered "blame" as 0 too, these "praise".
    assert tuner.evaluate(HELD_OUT[:5])["per_class"]["support"] == [0, 5, 0, 0]
    numbers = FineTuner(body(), tokenizer, num_classes=3)
    numbers.fit([{"text": f"t{i}", "label": i % 2} for i in range(6)], max_steps=1)
    assert numbers.label_names == ["0", "1", "2"]


@pytest.mark.parametrize("labels", [["blame", "praise"], [0, 1]])
def test_labels_survive_saving(tokenizer, tmp_path, labels):
    rows = [{"text": row["text"], "label": labels[k]} for row, k in zip(ROWS, LABELS, strict=True)]
    tuner = FineTuner(body(), tokenizer)
    tuner.fit(rows, options=FAST)
    tuner.save(tmp_path / "model")
    again = FineTuner.load(tmp_path / "model")
    assert again.label_names == tuner.label_names == [str(label) for label in labels]
    texts = [row["text"] for row in HELD_OUT]
    first, second = tuner.predict(texts), again.predict(texts)
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    assert first.labels == second.labels
    assert set(first.labels) <= {str(label) for label in labels}
    # And it can be trained on, from rows and labels as before.
    assert again.fit(rows, max_steps=1).steps == 1
    assert again.evaluate(rows)["count"] == len(rows)


def test_transformers_reads_the_body_that_was_saved(learned, tokenizer, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tuner, _ = learned
    tuner.save(tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("a lovely evening")["input_ids"]
    assert ids == tokenizer.encode("a lovely evening")
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    found = tuner.body.get_hidden_states(Batch.from_sequences([ids])).data
    np.testing.assert_allclose(found, expected, atol=1e-5)


# -- making one ------------------------------------------------------------------------------------


def test_a_tokenizer_must_fit_the_model(tokenizer):
    expected = f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab_size 100"
    assert message_of(ConfigError, FineTuner, body(vocab_size=100), tokenizer) == expected
    expected = "FineTuner needs a tokenizer beside a model that is not a path"
    assert message_of(ConfigError, FineTuner, body()) == expected


def test_a_path_brings_its_tokenizer(tokenizer, tmp_path):
    model = body(seed=7)
    model.save(tmp_path, tokenizer)
    tuner = loopos.FineTuner(str(tmp_path), num_classes=2)
    assert tuner.tokenizer.encode("a film") == tokenizer.encode("a film")
    for name, parameter in model.parameters().items():
        np.testing.assert_array_equal(tuner.body.parameters()[name].data, parameter.data)


# -- best weights ----------------------------------------------------------------------------------


def test_the_best_weights_are_in_place_at_the_end(tokenizer, tmp_path):
    # So high a rate undoes in the end what it learned: the best evaluation is not the last.
    options = Options(learning_rate=0.3, optimizer="sgd", momentum=0.9, batch_size=10, num_epochs=8)
    tuner = FineTuner(body(), tokenizer, seed=1)
    result = tuner.fit(ROWS, HELD_OUT, options, output_dir=tmp_path)
    losses = [record["eval"]["loss"] for record in result.evaluations]
    assert losses[-1] > min(losses)
    assert tuner.evaluate(HELD_OUT)["loss"] == min(losses) == result.best_metric
    # Without a directory there is nothing to go back to.
    other = FineTuner(body(), tokenizer, seed=1)
    other.fit(ROWS, HELD_OUT, options)
    assert other.evaluate(HELD_OUT)["loss"] == losses[-1]


def test_a_run_that_was_stopped_keeps_its_last_weights(tokenizer, tmp_path):
    options = Options(learning_rate=3e-3, batch_size=10, num_epochs=3)
    whole = FineTuner(body(), tokenizer)
    whole.fit(ROWS, options=options)
    halted, calls = FineTuner(body(), tokenizer), itertools.count(1)
    result = halted.fit(ROWS, options=options, output_dir=tmp_path, stop=lambda: next(calls) == 7)
    assert (result.steps, result.stopped_reason) == (7, "interrupted")
    resumed = FineTuner(body(seed=9), tokenizer)
    result = resumed.fit(ROWS, options=options, output_dir=tmp_path, resume=True)
    assert result.steps == 15
    for name, value in values(whole).items():
        np.testing.assert_array_equal(values(resumed)[name], value)


# -- the report ------------------------------------------------------------------------------------


def test_the_report_counts_tokens(tokenizer):
    tuner = FineTuner(body(), tokenizer)
    training = read_labelled([*ROWS, {"text": "a " * 100, "label": "blame"}])
    validation = read_labelled(
        [*HELD_OUT, {"text": "b " * 100, "label": "blame"}], label_names=training.label_names
    )
    report = tuner.report(training, validation, Options(max_length=40))
    lengths = [len(tokenizer.encode(text)) for text in training.texts]
    assert (report.tokens, report.lengths["max"]) == (sum(lengths), max(lengths))
    assert report.max_length == 40
    assert report.truncated.count == 2
    assert report.truncated.places == ["row 51", "row 11"]
    assert report.classes == {"blame": 26, "praise": 25}
    assert tuner.report(training).max_length == 48
