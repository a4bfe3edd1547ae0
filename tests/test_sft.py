"""Supervised fine-tuning: the loss is over what the assistant says, and nothing else."""

import json

import numpy as np
import pytest
from tokenizers import processors

import loopos
from loopos.config import load_config
from loopos.data.batch import Batch
from loopos.data.conversations import read_conversations
from loopos.data.readers import Texts
from loopos.data.tokenizer import Tokenizer, train_bpe
from loopos.errors import CheckpointError, ConfigError, DataError, ModelFormatError
from loopos.methods.language_model import weighted_pieces
from loopos.methods.pretraining import Pretrainer
from loopos.methods.sft import Options, SupervisedFineTuner
from loopos.models import Transformer, TransformerConfig, load_model
from loopos.models.adapter import LoraConfig
from loopos.runner import run
from loopos.training.loop import Interrupted

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"},
                  {"role": "assistant", "content": f"It is {i}, 五 😀."}]}
    for i in range(6)
] + [
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Go"},
                  {"role": "assistant", "content": "One"}, {"role": "user", "content": "on"},
                  {"role": "assistant", "content": "Two two"}]}
]  # fmt: skip
PLAIN = [{"prompt": f"What is {i}?", "completion": f" It is {i} 😀."} for i in range(4)]


def tokenizer(template=TEMPLATE):
    corpus = [m["content"] for row in ROWS for m in row["messages"]] + ["user assistant system\n"]
    found = train_bpe(corpus, 320)
    found._backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    found.chat_template = template
    return found


TOKENIZER = tokenizer()
DATA = read_conversations(ROWS)


def model(seed=0, **changes):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 32, "max_seq_len": 64}
    sizes["vocab_size"] = TOKENIZER.vocab_size
    return Transformer(TransformerConfig(**(sizes | changes)), seed=seed)


def tuner(found=None, **changes):
    return SupervisedFineTuner(model(**changes), found or TOKENIZER)


def message_of(kind, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(row, which=slice(None)):
    """Return text and answers of a row, in another way than the method's."""
    texts, answers = [], []
    for m in row["messages"]:
        texts.append(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n")
        if m["role"] == "assistant":
            answers.append(f"{m['content']}<|im_end|>")
    return "".join(texts), "".join(answers[which])


def direct_loss(network, samples):
    """Return the mean loss over targets that count, each sample alone, from the logits."""
    losses = []
    for ids, marks in samples:
        logits = network.forward(Batch.from_sequences([ids])).data.astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses += [-logs[i, ids[i + 1]] for i in range(len(ids) - 1) if marks[i + 1]]
    return np.mean(losses)


# -- what is trained on ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train_on", "which"), [("assistant", slice(None)), ("last_assistant", slice(-1, None))]
)
def test_exactly_the_answers_are_trained_on(train_on, which):
    samples = tuner()._samples(DATA, Options(train_on=train_on))
    for row, ids, marks in zip(ROWS, samples.tokens, samples.marks, strict=True):
        text, answers = written(row, which)
        assert TOKENIZER.decode(ids) == text
        assert TOKENIZER.decode(ids[marks == 1]) == answers
        assert set(marks.tolist()) == {0, 1}


def test_the_loss_is_that_over_the_answers():
    trainer = tuner()
    for train_on in ("assistant", "last_assistant", "all"):
        options = Options(train_on=train_on)
        samples = trainer._samples(DATA, options)
        pairs = list(zip(samples.tokens, samples.marks, strict=True))
        expected = direct_loss(trainer.model, pairs)
        found = trainer.evaluate(DATA, options)
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["perplexity"] == pytest.approx(np.exp(found["loss"]), rel=1e-12)
        step = tuner().fit(DATA, options=options, batch_size=100, max_steps=1)
        assert step.history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_all_counts_every_token():
    samples = tuner()._samples(DATA, Options(train_on="all"))
    assert all((marks == 1).all() for marks in samples.marks)
    text = [written(row)[0] for row in ROWS]
    assert [TOKENIZER.decode(ids) for ids in samples.tokens] == text


def test_it_learns_to_answer_and_not_to_ask():
    trainer = tuner()
    before, asked = trainer.evaluate(DATA)["loss"], trainer.evaluate(DATA, Options(train_on="all"))
    result = trainer.fit(DATA, learning_rate=1e-2, batch_size=4, num_epochs=40)
    assert before == pytest.approx(np.log(TOKENIZER.vocab_size), abs=0.1)
    after = trainer.evaluate(DATA)["loss"]
    assert after < 0.1 * before
    # What stands before the answers was never a target.
    assert trainer.evaluate(DATA, Options(train_on="all"))["loss"] > max(1.0, 10 * after)
    assert asked["loss"] > 5
    assert result.history[-1]["loss"] < 0.5


def test_what_was_learned_is_what_generation_says():
    from loopos.data.chat import ChatTemplate
    from loopos.generation import generate

    trainer = tuner(d_model=32)
    trainer.fit(DATA, learning_rate=5e-3, batch_size=4, num_epochs=150)
    template = ChatTemplate(TOKENIZER)
    prompts = [template.prompt(row["messages"][:1]) for row in ROWS[:6]]
    found = generate(
        trainer.model, prompts, tokenizer=TOKENIZER, temperature=0, max_new_tokens=30,
        stop_ids=template.stop_ids,
    )  # fmt: skip
    assert [g.text for g in found] == [row["messages"][1]["content"] for row in ROWS[:6]]
    assert {g.stop_reason for g in found} == {"stop_token"}


def test_prompts_and_completions_without_a_template():
    found = tokenizer(template=None)
    data = read_conversations(PLAIN)
    samples = tuner(found)._samples(data, Options())
    for row, ids, marks in zip(PLAIN, samples.tokens, samples.marks, strict=True):
        prompt = found.encode(row["prompt"])
        assert ids[: len(prompt)].tolist() == prompt
        assert found.decode(ids[marks == 1]) == row["completion"] + "<|endoftext|>"
        assert marks.sum() == len(ids) - len(prompt)
    every = tuner(found)._samples(data, Options(train_on="all"))
    assert all((marks == 1).all() for marks in every.marks)
    # With a template they are what the user and the assistant say.
    samples = tuner()._samples(data, Options())
    assert TOKENIZER.decode(samples.tokens[0]) == (
        "<|im_start|>user\nWhat is 0?<|im_end|>\n<|im_start|>assistant\n It is 0 😀.<|im_end|>\n"
    )


def test_special_tokens_stand_once_around_a_plain_row():
    found = tokenizer(template=None)
    begin, end = found.token_to_id("<|im_start|>"), found.eos_id
    found._backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>",
        special_tokens=[("<|im_start|>", begin), ("<|endoftext|>", end)],
    )
    samples = tuner(found)._samples(read_conversations(PLAIN), Options())
    for ids in samples.tokens:
        assert (ids[0], ids[-1]) == (begin, end)
        assert [ids.tolist().count(i) for i in (begin, end)] == [1, 1]


def test_a_prompt_stands_as_it_will_when_text_is_generated():
    """An end of text that it writes out itself is a part of it."""
    found = tokenizer(template=None)
    row = {"prompt": "one<|endoftext|>", "completion": " two"}
    (ids,) = tuner(found)._samples(read_conversations([row]), Options()).tokens
    (prompt,) = found.encode_open([row["prompt"]])
    assert prompt[-1] == found.eos_id
    assert ids.tolist() == [*prompt, *found.encode(" two"), found.eos_id]


def test_only_the_completion_of_messages_is_trained_on():
    row = {"prompt": ROWS[6]["messages"][:4], "completion": ROWS[6]["messages"][4:]}
    samples = tuner()._samples(read_conversations([row]), Options())
    assert TOKENIZER.decode(samples.tokens[0]) == written(ROWS[6])[0]
    trained = samples.tokens[0][samples.marks[0] == 1]
    assert TOKENIZER.decode(trained) == "Two two<|im_end|>"


# -- length ----------------------------------------------------------------------------------------


def lengths():
    return [len(TOKENIZER.encode(written(row)[0])) for row in ROWS]


def test_answers_without_an_end_are_reported():
    def warned(found, rows):
        report = tuner(found).report(read_conversations(rows))
        return [w.partition(": ") for w in report.warnings if "nothing marks the end" in w]

    assert not warned(TOKENIZER, ROWS)
    open_ended = tokenizer(TEMPLATE.replace("<|im_end|>", ""))
    said = "nothing marks the end of an answer, so that the model does not learn to stop"
    why = "the chat template closes no turn with a special token"
    assert warned(open_ended, ROWS) == [(said, ": ", why)]
    assert not warned(tokenizer(None), PLAIN)
    ((_, _, why),) = warned(Tokenizer(TOKENIZER._backend, "<no such token>"), PLAIN)
    assert why.startswith("the tokenizer names no token that ends a text")


def test_long_conversations_are_left_out_and_reported():
    limit = lengths()[0]
    assert lengths()[6] > limit
    options = Options(max_length=limit)
    trainer = tuner()
    samples = trainer._samples(DATA, options)
    assert samples.rows == list(range(6))
    report = trainer.report(DATA, DATA.take([0]), options)
    assert (report.rows, report.dropped.count, report.dropped.places) == (7, 1, ["row 7"])
    assert report.lengths["max"] == lengths()[6]
    assert (
        f"left out are 1 of 8 conversations, which have more than {limit} tokens (row 7)"
        in report.warnings
    )
    assert trainer.report(DATA, None, Options()).dropped.count == 0


def test_long_conversations_are_cut_or_refused():
    limit = lengths()[6] - 3
    trainer = tuner()
    samples = trainer._samples(DATA, Options(max_length=limit, overflow="truncate"))
    assert samples.rows == list(range(7))
    whole = trainer._samples(DATA, Options())
    assert samples.tokens[6].tolist() == whole.tokens[6][:limit].tolist()
    assert samples.marks[6].tolist() == whole.marks[6][:limit].tolist()
    report = trainer.report(DATA, None, Options(max_length=limit, overflow="truncate"))
    assert report.truncated.places == ["row 7"]
    found = message_of(DataError, trainer.fit, DATA, max_length=limit, overflow="error")
    assert found == f"row 7: has {lengths()[6]} tokens, more than max_length {limit}"


def test_whatever_the_limit_what_is_left_is_what_was_there():
    trainer = tuner()
    whole = trainer._samples(DATA, Options())
    for limit in range(lengths()[0] - 4, lengths()[6]):
        cut = trainer._samples(DATA, Options(max_length=limit, overflow="truncate"))
        assert cut.rows == [i for i in range(7) if (whole.marks[i][:limit] == 1).any()]
        assert sorted([*cut.rows, *cut.left_out]) == list(range(7))
        for row, ids, marks in zip(cut.rows, cut.tokens, cut.marks, strict=True):
            assert ids.tolist() == whole.tokens[row][:limit].tolist()
            assert marks.tolist() == whole.marks[row][:limit].tolist()


def test_what_is_cut_to_nothing_is_reported_and_never_trained_as_nothing():
    trainer = tuner()
    system = {"role": "system", "content": "Be short. " * 4}
    rows = [*ROWS[:2], {"messages": [system, *ROWS[0]["messages"]]}]
    data = read_conversations(rows)
    limit = lengths()[0]
    options = Options(max_length=limit, overflow="truncate")
    samples = trainer._samples(data, options)
    assert samples.rows == [0, 1]
    report = trainer.report(data, None, options)
    assert report.dropped.places == ["row 3"]
    assert (
        f"left out are 1 of 3 conversations, which have nothing to train on in {limit} tokens "
        "(row 3)"
    ) in report.warnings
    found = message_of(DataError, trainer.fit, data, max_length=4, overflow="truncate")
    assert found == (
        "row 1: neither this conversation nor any other has anything to train on within "
        "max_length 4"
    )
    found = message_of(DataError, trainer.fit, data, max_length=4)
    assert found == "row 1: neither this conversation nor any other fits max_length 4"


def test_a_template_that_leaves_the_answer_out_is_an_error():
    found = tokenizer("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    trainer = tuner(found)
    assert message_of(DataError, trainer.fit, DATA) == "row 1: there is no token in it to train on"


# -- what does not fit -----------------------------------------------------------------------------


def test_templates_that_fail_are_named_with_the_row():
    refuses = tokenizer(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TEMPLATE
    )
    assert message_of(DataError, tuner(refuses).fit, DATA) == (
        "row 7: the chat template refuses this: no system"
    )
    attacks = tokenizer("{{ messages.__class__.__mro__ }}")
    assert message_of(ModelFormatError, tuner(attacks).report, DATA).startswith(
        "row 1: the chat template is not safe: "
    )
    broken = tokenizer("{% if %}")
    assert message_of(ModelFormatError, tuner, broken).startswith("the chat template: line 1 ")
    none = tokenizer(template=None)
    assert message_of(ConfigError, tuner(none).fit, DATA) == (
        "row 1: the tokenizer has no chat template: write one to chat_template.jinja in the "
        "directory that data.tokenizer or data.pretrained_weights names ('loopos tokenizer "
        "train' makes such a directory), or set tokenizer.chat_template in Python"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_length": 1}, "training.max_length: expected at least 2, found 1"),
        (
            {"max_length": 65},
            "training.max_length: 65 is more than the model's max_seq_len 64",
        ),
        (
            {"overflow": "cut"},
            'training.overflow: expected one of "drop", "truncate", "error", found \'cut\'',
        ),
        (
            {"train_on": "user"},
            'training.train_on: expected one of "assistant", "last_assistant", "all", '
            "found 'user'",
        ),
        ({"max_lenght": 4}, "unknown option 'max_lenght'; did you mean 'max_length'?"),
    ],
)
def test_options_that_do_not_fit_are_named(overrides, message):
    assert message_of(ConfigError, tuner().fit, DATA, **overrides) == message


def test_a_model_that_cannot_speak_is_refused():
    expected = "supervised fine-tuning needs a causal model with a language-model head"
    assert message_of(ConfigError, tuner, causal=False) == expected
    assert "more than the model's vocab_size 100" in message_of(ConfigError, tuner, vocab_size=100)


# -- whole runs ------------------------------------------------------------------------------------


def project(directory, rows=ROWS, **sections):
    (directory / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model().save(directory / "base", TOKENIZER)
    values = {
        "model": {},
        "computation": {"method": "sft"},
        "training": {"learning_rate": 0.01, "batch_size": 4, "num_epochs": 2},
        "data": {"training_data": str(directory / "t.jsonl"),
                 "pretrained_weights": str(directory / "base"),
                 "output_dir": str(directory / "out")},
    }  # fmt: skip
    for name, content in sections.items():
        values[name] = values[name] | content
    (directory / "run.json").write_text(json.dumps(values))
    return load_config(directory / "run.json")


def test_a_configuration_is_run(tmp_path):
    config = project(tmp_path, data={"validation_fraction": 0.3})
    summary = run(config)
    assert set(summary.evaluation) == {"loss", "perplexity"}
    again = SupervisedFineTuner(
        load_model(tmp_path / "out" / "model"), loopos.load_tokenizer(tmp_path / "out" / "model")
    )
    assert again.tokenizer.chat_template == TEMPLATE
    trainer = tuner()
    held_out = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert (held_out["rows"], held_out["validation_rows"]) == (5, 2)
    assert again.evaluate(DATA)["loss"] < trainer.evaluate(DATA)["loss"]


def test_a_fresh_model_learns_prompts_and_completions(tmp_path):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 280}
    data = {"pretrained_weights": None}
    config = project(tmp_path, PLAIN, model=sizes, data=data)
    summary = run(config)
    assert summary.result.steps == 2
    found = loopos.load_tokenizer(tmp_path / "out" / "model")
    assert found.chat_template is None
    config = project(tmp_path, ROWS, model=sizes, data=data | {"output_dir": "other"})
    found = message_of(ConfigError, run, config)
    assert found.startswith(f"{tmp_path / 't.jsonl'}:")
    assert "the tokenizer has no chat template" in found


def test_a_run_is_continued_to_the_same_weights(tmp_path):
    config = project(tmp_path)
    run(config)
    expected = load_model(tmp_path / "out" / "model").parameters()
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 3

    again = load_config(tmp_path / "run.json", [f"data.output_dir={tmp_path / 'again'}"])
    with pytest.raises(Interrupted):
        run(again, stop=stop)
    run(again, resume=True)
    for name, parameter in load_model(tmp_path / "again" / "model").parameters().items():
        np.testing.assert_array_equal(parameter.data, expected[name].data)
    changed = load_config(
        tmp_path / "run.json",
        [f"data.output_dir={tmp_path / 'again'}", "training.train_on=all"],
    )
    with pytest.raises(CheckpointError, match=r"training\.train_on: 'all', but the run"):
        run(changed, resume=True)


def test_adapters_are_trained_alone(tmp_path):
    run(project(tmp_path, training={"lora": {"rank": 2}, "num_epochs": 3}))
    found = load_model(tmp_path / "out" / "model")
    assert found.adapters
    base = load_model(tmp_path / "base").parameters()
    for name, parameter in found.parameters().items():
        if name in base:
            np.testing.assert_array_equal(parameter.data, base[name].data)
    trainer = tuner()
    before = trainer.evaluate(DATA)["loss"]
    result = trainer.fit(
        DATA, DATA, learning_rate=1e-2, max_steps=20, eval_steps=5, lora=LoraConfig(rank=4)
    )
    found = [e["eval"]["loss"] for e in result.evaluations]
    assert found[-1] < found[0] < before
    assert trainer.evaluate(DATA)["loss"] == found[-1]


def test_classes_make_no_sense(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.num_classes: a language model has no classes"):
        project(tmp_path, model={"num_classes": 2})


def test_the_library_names_it():
    assert loopos.SupervisedFineTuner is SupervisedFineTuner


def test_files_are_data(tmp_path):
    project(tmp_path)
    trainer = tuner()
    assert trainer.evaluate(tmp_path / "t.jsonl") == trainer.evaluate(DATA)
    result = trainer.fit(tmp_path / "t.jsonl", str(tmp_path / "t.jsonl"), max_steps=1)
    assert result.evaluations[0]["eval"] == trainer.evaluate(DATA)


def test_samples_are_made_once_for_one_tokenizer_and_set_of_options():
    data = read_conversations(ROWS)
    trainer = tuner()
    first = trainer._samples(data, Options())
    assert trainer._samples(data, Options(learning_rate=1)) is first
    assert trainer._samples(data, Options(train_on="all")) is not first
    other = tuner(tokenizer("!" + TEMPLATE))
    assert TOKENIZER.decode(other._samples(data, Options()).tokens[0]).startswith("!<|im_start|>")


# -- preview ---------------------------------------------------------------------------------------


def test_a_preview_shows_what_is_trained_on():
    pieces = tuner().preview(DATA, Options(), rows=2)
    assert pieces == [
        [
            (f"<|im_start|>user\nWhat is {i}?<|im_end|>\n<|im_start|>assistant\n", 0.0),
            (f"It is {i}, 五 😀.<|im_end|>", 1.0),
            ("\n", 0.0),
        ]
        for i in range(2)
    ]
    every = tuner().preview(DATA, Options(train_on="all"), rows=1)
    assert [weight for _, weight in every[0]] == [0.0, 1.0]
    assert len(tuner().preview(DATA, Options(), rows=99)) == 7


def test_a_preview_of_pretraining_has_every_token_but_the_first():
    texts = ["What is 五 😀?", "It"]
    data = Texts(texts, ["row 1", "row 2"])
    found = Pretrainer(model(), TOKENIZER).preview(data, rows=1)
    assert ["".join(text for text, _ in pieces) for pieces in found] == [f"{texts[0]}<|endoftext|>"]
    first = TOKENIZER.decode([TOKENIZER.encode(texts[0])[0]])
    assert found[0][0] == (first, 0.0)
    assert [weight for _, weight in found[0]] == [0.0, 1.0]


def test_a_character_in_several_tokens_is_in_one_piece():
    ids = np.array(TOKENIZER.encode("a𓀀b"))
    assert len(ids) > 4
    for cut in range(1, len(ids)):
        weights = np.where(np.arange(len(ids)) < cut, 0.0, 0.5)
        pieces = weighted_pieces(TOKENIZER, ids, weights)
        assert "".join(text for text, _ in pieces) == "a𓀀b"
        assert {weight for _, weight in pieces} <= {0.0, 0.5}
