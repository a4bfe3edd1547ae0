"""Chain of thought: a language model learns to reason step by step before it answers.

    cot = loopos.ChainOfThought("path/to/model")
    cot.fit("problems.jsonl", num_epochs=3, learning_rate=1e-4)
    solution = cot.solve_with_reasoning("Tom has 3 boxes of 4 pens. How many pens?", samples=8)
    solution.answer, solution.steps, solution.confidence

Problems are written with their steps and answers (Wei et al. 2022), the loss counts on steps and
answer. Asked several times, answers are put to the vote (self-consistency, Wang et al. 2023). With
``rounds`` the model learns from its own solutions too, those that reach the right answer (STaR,
Zelikman et al. 2022).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loopos.data.answers import same_answer
from loopos.data.readers import Texts
from loopos.data.reasoning import ReasoningExample, ReasoningExamples, read_reasoning
from loopos.data.report import DataReport
from loopos.data.solutions import SolutionTemplate, SolutionWriter
from loopos.data.tokenizer import Tokenizer, load_tokenizer
from loopos.errors import ConfigError, DataError
from loopos.files import atomic_write_text
from loopos.generation import Generation, SamplingOptions
from loopos.methods.common import (
    RunArguments,
    fit,
    train_only,
    trained_body,
    with_adapters,
    with_overrides,
)
from loopos.methods.language_model import (
    NextTokenObjective,
    Piece,
    next_token_evaluator,
    require_language_model,
    weighted_pieces,
)
from loopos.methods.reasoning import (
    Options,
    Samples,
    encode_examples,
    keep_template,
    kept_template,
    reasoning_report,
    with_steps,
)
from loopos.methods.solving import Solution, asked_for, voted
from loopos.models.transformer import Transformer
from loopos.models.weights import load_model
from loopos.training.loop import TrainResult
from loopos.training.trackers import Callback

__all__ = ["ChainOfThought", "Options", "Solution", "make", "read"]

Array = np.ndarray[Any, Any]

#: A fresh tokenizer has a token for each digit, so that numbers are read as they are calculated.
INDIVIDUAL_DIGITS = True
#: Places of examples left out that a warning names.
_PLACES = 5


class _StoppedError(Exception):
    """A run was asked to stop while it sampled solutions."""


class ChainOfThought:
    """Trains a language model to reason, and solves problems with it.

    Parameters
    ----------
    model : Transformer or path
        Causal, with a language-model head; a path is loaded with its tokenizer, and with the
        templates it was trained with.
    tokenizer : Tokenizer, optional
        May be absent when `model` is a path.
    template : SolutionTemplate, optional
        How problems, steps and answers are written.
    chat : bool, optional
        Whether problems are turns in the model's chat template; by default where it has one.
    seed : int
        Of shuffling, adapters, dropout and sampling.

    Raises
    ------
    ConfigError
        If the model is bidirectional, has no head, or a smaller vocabulary than the tokenizer; or
        there is no tokenizer, or no chat template where `chat` is True.
    """

    def __init__(
        self,
        model: Transformer | str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        template: SolutionTemplate | None = None,
        chat: bool | None = None,
        seed: int = 0,
    ):
        if isinstance(model, (str, Path)):
            tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
            kept = kept_template(Path(model))
            if kept is not None and template is None:
                template, chat = kept[0], kept[1] if chat is None else chat
            model = load_model(model)
        if tokenizer is None:
            raise ConfigError("ChainOfThought needs a tokenizer beside a model that is not a path")
        require_language_model(model, tokenizer, "chain of thought")
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self._write = SolutionWriter(tokenizer, template or SolutionTemplate(), chat)
        self._chat = chat

    @property
    def template(self) -> SolutionTemplate:
        """How problems, steps and answers are written."""
        return self._write.template

    # -- training --------------------------------------------------------------------------------

    def fit(
        self,
        training_data: ReasoningExamples | str | Path,
        validation_data: ReasoningExamples | str | Path | None = None,
        options: Options | None = None,
        *,
        output_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = False,
        stop: Callable[[], bool] | None = None,
        run_config: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> TrainResult:
        """Train on problems with their solutions; parameters as :meth:`loopos.FineTuner.fit`.

        With ``rounds``, each has a directory ``round-1``, ``round-2``... in `output_dir`, with the
        solutions that were kept in ``kept.jsonl``; the result is that of the last one.

        Raises
        ------
        DataError
            If an example does not fit, or none does.
        ConfigError
            If an option has no such name or value.
        NumericalError
            If a loss or gradient is not finite.
        """
        options = with_overrides(options or Options(), overrides)
        self._take_templates(options)
        training = _examples(training_data, options)
        validation = None if validation_data is None else _examples(validation_data, options)
        self.model = with_adapters(self.model, options, self.seed)
        train_only(self.model.parameters(), trained_body(self.model))
        run = RunArguments(
            output_dir=output_dir, callbacks=callbacks, resume=resume, stop=stop,
            run_config=run_config,
        )  # fmt: skip
        labelled = with_steps(training) if options.rounds else training
        start = self._trained_arrays() if options.rounds else {}
        result = self._train(labelled, validation, options, run)
        for number in range(1, options.rounds + 1):
            if result.stopped_reason == "interrupted":
                return result
            root = None if output_dir is None else Path(output_dir) / f"round-{number}"
            try:
                kept = self._kept(training, options, number, root, resume, stop)
            except _StoppedError:  # a run that goes on samples again, from the same seed
                return replace(result, stopped_reason="interrupted")
            for name, array in start.items():
                self.model.parameters()[name].data[...] = array
            both = ReasoningExamples.of([*labelled, *kept])
            again = resume and root is not None and any((root / "checkpoints").glob("step-*"))
            result = self._train(both, validation, options, {**run, "output_dir": root,
                                                             "resume": again})  # fmt: skip
        return result

    def _train(
        self,
        training: ReasoningExamples,
        validation: ReasoningExamples | None,
        options: Options,
        run: RunArguments,
    ) -> TrainResult:
        samples = self._samples(training, options)
        return fit(
            self.model,
            self.model.parameters(),
            NextTokenObjective(self.model),
            samples.tokens,
            options,
            loss_weights=samples.weights(options),
            seed=self.seed,
            evaluate=None if validation is None else lambda: self._measure(validation, options),
            run=run,
        )

    def _trained_arrays(self) -> dict[str, Array]:
        """Return copies of what will be trained, to begin a round where the first one began."""
        trained = self.model.parameters().items()
        return {name: p.data.copy() for name, p in trained if p.requires_grad}

    def _kept(
        self,
        training: ReasoningExamples,
        options: Options,
        number: int,
        root: Path | None,
        resume: bool,
        stop: Callable[[], bool] | None,
    ) -> list[ReasoningExample]:
        """Return new solutions that reach the right answer, or those of a run that goes on."""
        file = None if root is None else root / "kept.jsonl"
        if resume and file is not None and file.is_file():
            return list(read_reasoning(file)) if file.stat().st_size else []

        def look(_: Generation) -> None:
            if stop is not None and stop():
                raise _StoppedError

        kept = self.sample_solutions(training, options, seed=self.seed + number, on_finish=look)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = ({"problem": e.problem, "reasoning": list(e.steps), "answer": e.answer}
                    for e in kept)  # fmt: skip
            atomic_write_text(
                file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            )
        return kept

    def sample_solutions(
        self,
        problems: ReasoningExamples,
        options: Options | None = None,
        *,
        seed: int = 0,
        on_finish: Callable[[Generation], None] | None = None,
    ) -> list[ReasoningExample]:
        """Sample solutions for problems, and return those that reach the right answer.

        Of each problem every chain of steps is taken once, and none that stands in `problems`.
        Problems that leave no room for a solution are passed over.

        Parameters
        ----------
        problems : ReasoningExamples
            Their steps are not shown to the model.
        options : Options, optional
            ``samples``, ``temperature``, ``top_p``, ``max_new_tokens``.
        seed : int
        on_finish : callable, optional
            Called with each solution as it is finished.
        """
        options = options or Options()
        found: list[ReasoningExample] = []
        seen = {(e.problem, e.steps) for e in problems}
        pairs = dict.fromkeys((e.problem, e.answer) for e in problems)
        asked = [pair for pair in pairs if self._has_room(pair[0])]
        problems_asked = [problem for problem, _ in asked]
        generations = self._sampled(
            problems_asked, options, options.samples, options.temperature, seed, on_finish
        )
        for generation in generations:
            problem, answer = asked[generation.prompt_index]
            steps, given = self.template.parse(generation.text or "")
            new = steps and (problem, steps) not in seen
            if new and given is not None and same_answer(given, answer):
                seen.add((problem, steps))
                found.append(ReasoningExample(problem, steps, answer))
        return found

    # -- data ------------------------------------------------------------------------------------

    def report(
        self,
        training: ReasoningExamples,
        validation: ReasoningExamples | None = None,
        options: Options | None = None,
    ) -> DataReport:
        """Return what the data holds, which examples are too long, and answers from nowhere.

        It warns where no token ends a solution, so that the model would not learn to stop.
        """
        options = options or Options()
        self._take_templates(options)
        sets = [data for data in (training, validation) if data is not None]
        samples = [self._samples(data, options) for data in sets]
        ends = bool(self._write.stop_ids)
        return reasoning_report(sets, samples, self._limit(options), options.with_steps, ends)

    def preview(
        self, training: ReasoningExamples, options: Options | None = None, rows: int = 3
    ) -> list[list[Piece]]:
        """Return the first `rows` examples in pieces, with how much each counts."""
        options = options or Options()
        self._take_templates(options)
        samples = self._samples(with_steps(training) if options.rounds else training, options)
        weights = samples.weights(options)
        return [
            weighted_pieces(self.tokenizer, samples.tokens[i], weights[i])
            for i in range(min(rows, len(samples.tokens)))
        ]

    def _take_templates(self, options: Options) -> None:
        template = options.template(self.template)
        if template != self.template or options.chat is not None:
            self._chat = self._chat if options.chat is None else options.chat
            self._write = SolutionWriter(self.tokenizer, template, self._chat)

    def _limit(self, options: Options) -> int:
        limit = self.model.config.max_seq_len
        if options.max_length is not None and options.max_length > limit:
            raise ConfigError(
                f"training.max_length: {options.max_length} is more than the model's "
                f"max_seq_len {limit}"
            )
        return options.max_length or limit

    def _samples(self, data: ReasoningExamples, options: Options) -> Samples:
        return encode_examples(data, self._write, options, self._limit(options))

    # -- solving ---------------------------------------------------------------------------------

    def evaluate(
        self, data: ReasoningExamples | str | Path, options: Options | None = None
    ) -> dict[str, Any]:
        """Return loss and perplexity of solutions, and how many problems are solved.

        Returns
        -------
        dict
            ``loss`` (nats per weight of a token) and ``perplexity``, of examples that have steps;
            with ``eval_problems`` also ``accuracy`` (of solutions found greedily), ``asked``,
            ``solved``, ``format_errors`` (solutions in which nothing marks an answer) and
            ``tokens_per_solution``; with ``eval_samples`` also ``accuracy_voted`` and
            ``mean_confidence``. A problem that leaves no room for a solution is not solved.
        """
        options = options or Options()
        self._take_templates(options)
        return self._measure(_examples(data, options), options)

    def _measure(self, data: ReasoningExamples, options: Options) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if not options.with_steps or any(example.steps for example in data):
            samples = self._samples(with_steps(data) if options.with_steps else data, options)
            weights = samples.weights(options)
            figures |= next_token_evaluator(self.model, samples.tokens, weights)()
        asked = data.take(range(min(options.eval_problems, len(data))))
        if not len(asked):
            return figures
        room = [i for i, problem in enumerate(asked.texts) if self._has_room(problem)]
        able = asked.take(room)
        greedy = self.solve(list(able.texts), options=options)
        solved = _number_right(greedy, able)
        figures |= {
            "accuracy": solved / len(asked),
            "asked": len(asked),
            "solved": solved,
            "format_errors": sum(self.template.marker not in s.text for s in greedy),
            "tokens_per_solution": sum(s.num_tokens for s in greedy) / max(len(greedy), 1),
        }
        if options.eval_samples > 1:
            voted = self.solve(
                list(able.texts), samples=options.eval_samples, options=options, seed=self.seed
            )
            figures["accuracy_voted"] = _number_right(voted, able) / len(asked)
            figures["mean_confidence"] = sum(s.confidence or 0.0 for s in voted) / len(asked)
        return figures

    def _has_room(self, problem: str) -> bool:
        """Whether the context has room for a solution behind a problem."""
        return bool(self._write.prompt(problem).size < self.model.config.max_seq_len)

    def solve_with_reasoning(
        self,
        problem: str,
        *,
        samples: int = 1,
        temperature: float | None = None,
        seed: int | None = None,
        options: Options | None = None,
    ) -> Solution:
        """Solve one problem; see :meth:`solve`."""
        return self.solve(
            [problem], samples=samples, temperature=temperature, seed=seed, options=options
        )[0]

    def solve(
        self,
        problems: Sequence[str],
        *,
        samples: int = 1,
        temperature: float | None = None,
        seed: int | None = None,
        options: Options | None = None,
    ) -> list[Solution]:
        """Solve problems: write steps and an answer, and take the answer that most samples give.

        Answers count as the same where :func:`loopos.data.answers.normal_answer` writes them alike.
        Of those with as many votes the one counts whose samples are the likeliest together.

        Parameters
        ----------
        problems : sequence of str
        samples : int
            Solutions of each problem.
        temperature : float, optional
            By default 0 (the likeliest token each time) for one sample, else that of `options`.
        seed : int, optional
            Of sampling; the trainer's by default.
        options : Options, optional
            ``temperature``, ``top_p``, ``max_new_tokens``, ``generation_batch_size``.

        Raises
        ------
        DataError
            If a problem leaves no room for a solution.
        """
        if isinstance(problems, str):
            raise DataError("expected a list of problems, found a single text")
        if samples < 1:
            raise ConfigError(f"samples: expected at least 1, found {samples}")
        options = options or Options()
        if temperature is None:
            temperature = options.temperature if samples > 1 else 0.0
        found = self._sampled(problems, options, samples, temperature, seed)
        groups = [found[i : i + samples] for i in range(0, len(found), samples)]
        pairs = zip(problems, groups, strict=True)
        return [voted(problem, group, self.template) for problem, group in pairs]

    def generate_reasoning_step(
        self,
        problem: str,
        steps: Sequence[str] = (),
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        seed: int | None = None,
    ) -> str:
        """Return the line that comes next after some steps: a step, or the marked answer.

        Empty where the model ends there.
        """
        sampling = SamplingOptions(
            max_new_tokens=max_new_tokens, temperature=temperature,
            stop=(self.template.step_end,), seed=self.seed if seed is None else seed,
        )  # fmt: skip
        (found,) = asked_for(self.model, self._write, [problem], sampling, steps=steps)
        text = found.text or ""
        return text.removeprefix(self.template.step.partition("{step}")[0]).strip()

    def _sampled(
        self,
        problems: Sequence[str],
        options: Options,
        samples: int,
        temperature: float,
        seed: int | None,
        on_finish: Callable[[Generation], None] | None = None,
    ) -> list[Generation]:
        sampling = SamplingOptions(
            max_new_tokens=options.max_new_tokens, temperature=temperature, top_p=options.top_p,
            num_samples=samples, seed=self.seed if seed is None else seed,
        )  # fmt: skip
        size = options.generation_batch_size
        return asked_for(
            self.model, self._write, problems, sampling, batch_size=size, on_finish=on_finish
        )

    def save(self, directory: str | Path) -> None:
        """Write model, tokenizer and templates; transformers loads the first two back."""
        self.model.save(directory, self.tokenizer)
        keep_template(directory, self.template, self._chat)


def _number_right(solutions: Sequence[Solution], examples: ReasoningExamples) -> int:
    return sum(
        solution.answer is not None and same_answer(solution.answer, example.answer)
        for solution, example in zip(solutions, examples, strict=True)
    )


def _examples(data: ReasoningExamples | str | Path, options: Options) -> ReasoningExamples:
    if isinstance(data, ReasoningExamples):
        return data
    return read_reasoning(data, need_steps=options.with_steps and not options.rounds)


def read(
    source: str | Path,
    text_field: str,
    label_field: str,
    *,
    options: Options,
    like: Texts | None = None,
    num_classes: int | None = None,
) -> ReasoningExamples:
    """Read problems for a run; there are no labels to read.

    Raises
    ------
    ConfigError
        If `num_classes` is given: a language model has none.
    """
    if num_classes is not None:
        raise ConfigError("model.num_classes: a language model has no classes")
    return _examples(Path(source) if isinstance(source, str) else source, options)


def make(
    model: Transformer,
    tokenizer: Tokenizer,
    training: ReasoningExamples,
    *,
    num_classes: int | None = None,
    seed: int = 0,
) -> ChainOfThought:
    """Make the trainer of a run."""
    return ChainOfThought(model, tokenizer, seed=seed)
