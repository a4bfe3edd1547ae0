"""Chain of thought: what counts in the loss, what is solved, how answers are voted on, rounds."""

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

import loopos
from loopos.autograd import no_grad
from loopos.config import load_config
from loopos.data.batch import Batch
from loopos.data.problems import make_problems
from loopos.data.reasoning import ReasoningExample, ReasoningExamples, read_reasoning
from loopos.data.solutions import SolutionTemplate
from loopos.data.tokenizer import Tokenizer, train_bpe
from loopos.errors import ConfigError, DataError
from loopos.generation import Generation
from loopos.methods import solving
from loopos.methods.chain_of_thought import ChainOfThought, Options
from loopos.methods.solving import voted
from loopos.models import Transformer, TransformerConfig
from loopos.models.adapter import LoraConfig
from loopos.runner import run
from loopos.training.loop import Interrupted

ROWS = make_problems(8, seed=3, levels=(1,))
DATA = read_reasoning(ROWS)
TOKENIZER = train_bpe(DATA.corpus, 300, individual_digits=True)


def model(seed=0, **changes):
    sizes = {"d_model": 32, "num_heads": 2, "num_layers": 2, "d_ff": 64, "max_seq_len": 256}
    sizes["vocab_size"] = TOKENIZER.vocab_size
    return Transformer(TransformerConfig(**(sizes | changes)), seed=seed)


def trainer(**changes):
    return ChainOfThought(model(**changes), TOKENIZER)


def weights_of(cot):
    return {name: p.data.copy() for name, p in cot.model.parameters().items()}


def losses_by_part(network, example):
    """Return the summed loss of problem, steps and answer, each found from the logits by hand."""
    parts = (
        f"Problem: {example.problem}\nReasoning:\n",
        "".join(step + "\n" for step in example.steps),
        f"Answer: {example.answer}<|endoftext|>",
    )
    ids = [np.array(TOKENIZER.encode(part)) for part in parts]
    whole = np.concatenate(ids)
    with no_grad():
        logits = network.forward(Batch.from_sequences([whole])).data.astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    losses = -logp[np.arange(whole.size - 1), whole[1:]]
    edges = np.maximum(np.cumsum([0, *(part.size for part in ids)]) - 1, 0)
    spans = list(pairwise(edges.tolist()))
    return [losses[a:b].sum() for a, b in spans], [b - a for a, b in spans]


# -- what is trained on ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.0, 1.0, 1.0), (0.0, 0.0, 1.0), (0.25, 0.5, 2.0)])
def test_each_part_counts_as_much_as_its_weight(weights):
    cot = trainer()
    sums, counts = losses_by_part(cot.model, DATA[0])
    options = Options(
        prompt_weight=weights[0], steps_weight=weights[1], answer_weight=weights[2],
        eval_problems=0,
    )  # fmt: skip
    found = cot.evaluate(DATA.take([0]), options)["loss"]
    assert found == pytest.approx(np.dot(weights, sums) / np.dot(weights, counts), rel=1e-5)


def test_preview_shows_what_counts():
    (pieces,) = trainer().preview(DATA, Options(answer_weight=2.0), rows=1)
    example = DATA[0]
    assert pieces == [
        (f"Problem: {example.problem}\nReasoning:\n", 0.0),
        ("".join(step + "\n" for step in example.steps), 1.0),
        (f"Answer: {example.answer}<|endoftext|>", 2.0),
    ]
    longest = ReasoningExample("word " * 200, ("so 3",), "3")
    several = ReasoningExamples.of([longest, ReasoningExample("p", (), "3"), *DATA])
    for data, options in ((several, Options(rounds=1)), (DATA, Options(rounds=1))):
        shown = trainer().preview(data, options, rows=1)
        assert shown == trainer().preview(DATA, Options(), rows=1)
    (pieces,) = trainer().preview(DATA, Options(with_steps=False), rows=1)
    assert [text for text, weight in pieces if weight] == [f"Answer: {example.answer}<|endoftext|>"]


CHANGES = [
    {"prompt_weight": 0.5}, {"steps_weight": 0.5}, {"answer_weight": 3.0}, {"with_steps": False},
    {"prompt_template": "Q: {problem}\n"}, {"step_template": "- {step}\n"},
    {"answer_template": "#### {answer}"},
]  # fmt: skip


def test_every_option_of_the_loss_changes_the_weights():
    def trained(**options):
        cot = trainer()
        cot.fit(DATA, max_steps=2, batch_size=4, learning_rate=1e-2, **options)
        return cot.model.parameters()["layers.0.mlp.up.weight"].data

    plain = trained()
    assert np.array_equal(plain, trained())
    for change in CHANGES:
        assert not np.array_equal(plain, trained(**change)), change


def test_examples_that_are_too_long_are_left_out_and_named():
    long = ReasoningExample(DATA[0].problem, ("1 + 1 = 2." * 60,), "2")
    data = ReasoningExamples.of([DATA[0], long], ["t.jsonl:1", "t.jsonl:2"])
    report = trainer().report(data, options=Options(max_length=200))
    assert report.dropped.places == ["t.jsonl:2"]
    assert any("left out are 1 of 2 examples, which have more than 200 tokens (t.jsonl:2)" in w
               for w in report.warnings)  # fmt: skip
    with pytest.raises(DataError, match=r"t\.jsonl:2: has \d+ tokens, more than max_length 200"):
        trainer().fit(data, max_steps=1, max_length=200, overflow="error")
    with pytest.raises(DataError, match="neither this example nor any other fits max_length 5"):
        trainer().fit(data, max_steps=1, max_length=5)


def test_solutions_without_an_end_are_reported():
    words = Tokenizer(TOKENIZER._backend, "<no such token>")
    report = ChainOfThought(model(), words).report(DATA)
    assert [w for w in report.warnings if "nothing marks the end" in w] == [
        "nothing marks the end of a solution, so that the model does not learn to stop: the "
        "tokenizer names no token that ends a text (eos_token in tokenizer_config.json)"
    ]
    assert "nothing marks" not in "".join(trainer().report(DATA).warnings)


def test_an_example_in_which_nothing_counts_is_never_trained_as_nothing():
    data = ReasoningExamples.of([*DATA, ReasoningExample("2 + 2?", (), "4")])
    cot = trainer()
    cot.fit(data, max_steps=1)  # its answer counts
    with pytest.raises(DataError, match="^row 9: has no steps, and nothing else counts"):
        cot.fit(data, max_steps=1, answer_weight=0.0)


def test_answers_from_nowhere_are_reported():
    odd = ReasoningExample("2 + 2?", ("2 + 2 = 4.",), "5")
    fine = [ReasoningExample("2 + 2?", ("2 + 2 = $4.00",), "4"), DATA[0]]
    report = trainer().report(ReasoningExamples.of([*fine, odd]))
    assert "the answers of 1 examples are not in their last step (row 3)" in report.warnings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_weight": -1.0}, "training.steps_weight: expected a number of at least 0"),
        ({"steps_weight": 0.0, "answer_weight": 0.0}, "with all weights 0 there is no loss"),
        ({"temperature": 0.0}, "training.temperature: expected a number above 0, found 0.0"),
        ({"samples": 0}, "training.samples: expected at least 1, found 0"),
        ({"top_p": 1.5}, r"training.top_p: expected a number in \(0, 1\], found 1.5"),
        ({"overflow": "cut"}, 'training.overflow: expected "drop" or "error"'),
        ({"prompt_template": "x"}, r"training.prompt_template: expected \{problem\} once"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Options(**options)


def test_models_that_cannot_reason():
    with pytest.raises(ConfigError, match="chain of thought needs a causal model"):
        ChainOfThought(model(causal=False), TOKENIZER)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        ChainOfThought(model())


# -- solving ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt():
    """A trainer that knows its eight problems by heart."""
    with loopos.use_backend("cython"):
        cot = ChainOfThought(model(d_model=64, d_ff=128), TOKENIZER)
        cot.fit(DATA, max_steps=150, batch_size=8, learning_rate=5e-3)
        yield cot


def test_what_was_learnt_is_solved_step_by_step(learnt):
    figures = learnt.evaluate(DATA)
    assert (figures["accuracy"], figures["asked"], figures["solved"]) == (1.0, 8, 8)
    assert (figures["format_errors"], figures["loss"] < 0.05) == (0, True)
    solution = learnt.solve_with_reasoning(DATA[2].problem)
    assert (solution.steps, solution.answer) == (DATA[2].steps, DATA[2].answer)
    assert solution.confidence is None
    assert solution.votes == {DATA[2].answer: 1}
    ids = TOKENIZER.encode(solution.text + "<|endoftext|>")
    assert solution.num_tokens == len(ids)


def test_log_probability_of_a_solution_is_that_of_its_tokens(learnt):
    solution = learnt.solve_with_reasoning(DATA[1].problem)
    sums, _ = losses_by_part(learnt.model, DATA[1])
    assert solution.logprob == pytest.approx(-(sums[1] + sums[2]), rel=1e-3, abs=1e-4)


def test_steps_one_by_one_are_the_solution(learnt):
    example, steps = DATA[0], []
    for _ in range(len(example.steps)):
        steps.append(learnt.generate_reasoning_step(example.problem, steps))
    assert tuple(steps) == example.steps
    last = learnt.generate_reasoning_step(example.problem, steps)
    assert last == f"Answer: {example.answer}"


def test_samples_are_put_to_the_vote(learnt):
    found = learnt.solve(list(DATA.texts), samples=5, temperature=0.5, seed=1)
    assert [s.answer for s in found] == [e.answer for e in DATA]
    for solution in found:
        assert solution.confidence == max(solution.votes.values()) / 5
        assert sum(solution.votes.values()) <= 5
    figures = learnt.evaluate(DATA, Options(eval_samples=3))
    assert figures["accuracy_voted"] == 1.0
    assert 0.5 < figures["mean_confidence"] <= 1.0


def test_a_saved_model_knows_its_templates(learnt, tmp_path):
    other = SolutionTemplate("{problem}\n", "{step}\n", "= {answer}")
    cot = ChainOfThought(learnt.model, TOKENIZER, template=other)
    cot.save(tmp_path)
    again = ChainOfThought(tmp_path)
    assert again.template == other
    prompt = again.tokenizer.decode(again._write.prompt("x"))
    assert prompt == "x\n"


def test_a_problem_that_fills_the_context_is_named():
    with pytest.raises(DataError, match="leaves no room for a solution"):
        trainer(max_seq_len=16).solve_with_reasoning("how many " * 20)


def test_problems_that_leave_no_room_are_not_solved(learnt):
    """One such row among others, left out of the training, ends neither evaluation nor round."""
    long = ReasoningExample("how many pens " * 200, ("1 + 1 = 2.",), DATA[0].answer)
    mixed = ReasoningExamples.of([long, *DATA])
    figures = learnt.evaluate(mixed, Options(eval_samples=2, temperature=0.1))
    assert (figures["asked"], figures["solved"], figures["accuracy"]) == (9, 8, 8 / 9)
    assert figures["accuracy_voted"] == 8 / 9
    kept = learnt.sample_solutions(mixed, Options(samples=2, temperature=2.0, max_new_tokens=40))
    assert long.problem not in {example.problem for example in kept}
    cot = trainer()
    cot.fit(mixed, mixed, rounds=1, samples=1, max_steps=1, max_new_tokens=4, eval_problems=2)


# -- votes -----------------------------------------------------------------------------------------


def sample(text, logprob, index=0):
    ids = np.arange(3, dtype=np.int32)
    return Generation(0, index, ids, np.array([logprob]), text, "stop_token")


def vote(*texts_and_logprobs):
    samples = [sample(text, logprob) for text, logprob in texts_and_logprobs]
    return voted("p", samples, SolutionTemplate())


def test_most_votes_win_and_the_likeliest_of_them_speaks():
    found = vote(
        ("a\nAnswer: 4", -1.0), ("b\nAnswer: $5.00", -9.0), ("c\nAnswer: 5", -3.0),
        ("no answer here", -0.1),
    )  # fmt: skip
    assert (found.answer, found.steps, found.logprob) == ("5", ("c",), -3.0)
    assert found.votes == {"4": 1, "5": 2}
    assert found.confidence == 0.5


def test_ties_go_to_the_likelier_answer():
    found = vote(("Answer: 4", -2.0), ("Answer: 5", -1.9), ("Answer: 4", -9.0), ("Answer: 5", -9.0))
    assert found.answer == "5"
    # Together two samples of 4 outweigh the single best one of 5.
    found = vote(("Answer: 4", -2.0), ("Answer: 5", -1.9), ("Answer: 4", -2.0), ("Answer: 5", -9.0))
    assert found.answer == "4"


def test_samples_without_an_answer():
    found = vote(("hm", -1.0), ("well", -0.5))
    assert (found.answer, found.votes, found.confidence) == (None, {}, 0.0)
    assert found.text == "well"
    assert vote(("it is 7 or 8", -1.0)).answer == "8"  # nothing marks it: the last number


# -- rounds ----------------------------------------------------------------------------------------


def canned(answers):
    """Return a stand-in for generate that gives each prompt the same texts."""

    def generate(model, prompts, sampling, *, on_finish=None, **options):
        made = [
            Generation(i, j, np.zeros(1, np.int32), np.zeros(1), answers[j], "stop_token")
            for i in range(len(prompts)) for j in range(sampling.num_samples)
        ]  # fmt: skip
        for generation in made if on_finish else ():
            on_finish(generation)
        return made

    return generate


def test_a_round_keeps_what_is_right_new_and_reasoned(monkeypatch):
    texts = ["1 + 2 = 3\nAnswer: 3", "1 + 2 = 3\nAnswer: 3", "Answer: 3", "2 + 1 = 3\nAnswer: 4",
             "2 + 1 = 3\nAnswer: 3.0", "known\nAnswer: 3"]  # fmt: skip
    monkeypatch.setattr(solving, "generate", canned(texts))
    problems = ReasoningExamples.of([ReasoningExample("p", ("known",), "3"),
                                     ReasoningExample("q", (), "5")])  # fmt: skip
    kept = trainer().sample_solutions(problems, Options(samples=6))
    assert kept == [ReasoningExample("p", (steps,), "3") for steps in ("1 + 2 = 3", "2 + 1 = 3")]


def test_rounds_train_from_the_start_on_more(monkeypatch, tmp_path):
    extra = ReasoningExample("p", ("1 + 2 = 3",), "3")
    unlabelled = ReasoningExamples.of([*DATA, ReasoningExample("p", (), "3")])
    texts = ["1 + 2 = 3\nAnswer: 3"]
    monkeypatch.setattr(solving, "generate", canned(texts))
    common = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2}
    cot = trainer()
    cot.fit(unlabelled, rounds=1, samples=1, output_dir=tmp_path / "run", **common)
    kept = list(read_reasoning(tmp_path / "run" / "round-1" / "kept.jsonl"))
    assert kept == [extra]
    direct = trainer()
    direct.fit(ReasoningExamples.of([*DATA, extra]), **common)
    for name, array in weights_of(direct).items():
        assert np.array_equal(array, weights_of(cot)[name]), name


@pytest.mark.parametrize("stopped_after", [1, 3, 11, 12, 14])
def test_rounds_go_on_byte_for_byte(monkeypatch, tmp_path, stopped_after):
    monkeypatch.setattr(solving, "generate", canned(["1 + 2 = 3\nAnswer: 3"]))
    data = ReasoningExamples.of([*DATA, ReasoningExample("p", (), "3")])
    common = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "rounds": 1, "samples": 1}
    whole = trainer()
    whole.fit(data, **common)
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == stopped_after

    result = trainer().fit(data, output_dir=tmp_path, stop=stop, **common)
    # Asked after each step of a phase but its last, and after each solution between the two.
    problems = len({(example.problem, example.answer) for example in data})
    assert (result.stopped_reason == "interrupted") == (stopped_after <= 4 + problems)
    assert (tmp_path / "round-1").exists() == (stopped_after > 2 + problems)
    again = trainer()
    again.fit(data, output_dir=tmp_path, resume=True, **common)
    for name, array in weights_of(whole).items():
        assert np.array_equal(array, weights_of(again)[name]), name


def test_a_round_that_kept_nothing_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(solving, "generate", canned(["1 + 2 = 4\nAnswer: 4"]))
    data = ReasoningExamples.of([*DATA, ReasoningExample("p", (), "3")])
    common = {"max_steps": 3, "batch_size": 4, "rounds": 1, "samples": 1}
    started = (tmp_path / "round-1" / "metrics.jsonl").exists
    result = trainer().fit(data, output_dir=tmp_path, stop=started, **common)
    assert result.stopped_reason == "interrupted"
    assert (tmp_path / "round-1" / "kept.jsonl").read_bytes() == b""
    again, whole = trainer(), trainer()
    assert again.fit(data, output_dir=tmp_path, resume=True, **common).steps == 3
    whole.fit(data, **common)
    for name, array in weights_of(whole).items():
        assert np.array_equal(array, weights_of(again)[name]), name


def test_a_single_text_is_no_list_of_problems():
    with pytest.raises(DataError, match="expected a list of problems, found a single text"):
        trainer().solve("1+1")


def test_rounds_need_some_reasoning():
    with pytest.raises(DataError, match="nor any other has steps"):
        trainer().fit(ReasoningExamples.of([ReasoningExample("p", (), "3")]), rounds=1, max_steps=1)


# -- runs ------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_byte_for_byte(tmp_path):
    common = {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-2, "eval_problems": 0}
    whole = trainer()
    whole.fit(DATA, **common)
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 2

    trainer().fit(DATA, output_dir=tmp_path, stop=stop, **common)
    again = trainer()
    again.fit(DATA, output_dir=tmp_path, resume=True, **common)
    for name, array in weights_of(whole).items():
        assert np.array_equal(array, weights_of(again)[name]), name


def test_adapters_alone_are_trained():
    cot = trainer()
    before = weights_of(cot)
    cot.fit(
        DATA, max_steps=2, learning_rate=1e-2, lora=LoraConfig(rank=2, target_modules=["c_attn"])
    )
    after = weights_of(cot)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert any(name.endswith("lora_b") and after[name].any() for name in after)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "t.jsonl").write_text(lines)
    config = {
        "model": {"d_model": 32, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 300,
                  "max_seq_len": 192},
        "computation": {"method": "chain_of_thought"},
        "training": {"max_steps": 2, "batch_size": 4, "eval_problems": 2, "max_new_tokens": 8},
        "data": {"reasoning_examples": "t.jsonl", "validation_data": "t.jsonl",
                 "output_dir": "out"},
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(config))
    return tmp_path


def test_a_run_from_a_configuration(project):
    summary = run(load_config("c.json", ["training.eval_samples=2", "training.answer_weight=3"]))
    assert summary.evaluation.keys() >= {"loss", "accuracy", "asked", "format_errors"}
    assert summary.evaluation["asked"] == 2
    saved = json.loads((project / "out" / "model" / "reasoning.json").read_text())
    assert saved["template"]["answer"] == "Answer: {answer}"
    tokenizer = loopos.load_tokenizer(project / "out" / "model")
    assert len(tokenizer.encode("2345")) == 4
    done = subprocess.run(
        [sys.executable, "-m", "loopos", "evaluate", "out", "t.jsonl", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    figures = json.loads(done.stdout)
    assert figures["asked"] == 8
    # With the options of the run: its length, its votes and its weights.
    assert figures["tokens_per_solution"] <= 8
    assert "accuracy_voted" in figures
    assert figures["loss"] == pytest.approx(summary.evaluation["loss"], rel=1e-5)


def test_a_configured_run_resumes(project):
    with pytest.raises(Interrupted):
        run(load_config("c.json"), stop=lambda: True)
    resumed = run(load_config("c.json"), resume=True)
    whole = run(load_config("c.json", ["data.output_dir=whole"]))
    assert resumed.result.history[-1]["loss"] == whole.result.history[-1]["loss"]
    files = [project / name / "model" / "model.safetensors" for name in ("out", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_wrong_rows_end_with_file_and_line(project):
    with open("t.jsonl", "a") as file:
        file.write('{"problem": "a", "reasoning": [], "answer": "b"}\n')
    done = subprocess.run(
        [sys.executable, "-m", "loopos", "validate", "c.json"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: t.jsonl:9: there is no step in 'reasoning'\n"


def test_training_data_is_under_another_key(project):
    with pytest.raises(ConfigError, match="'chain_of_thought' reads data.reasoning_examples"):
        load_config("c.json", ["data.training_data=t.jsonl"])
