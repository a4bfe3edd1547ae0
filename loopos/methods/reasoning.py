"""What chain of thought is trained with: its options, its examples as tokens, what is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loopos.data.answers import extract_answer, normal_answer, same_answer
from loopos.data.reasoning import ReasoningExample, ReasoningExamples
from loopos.data.report import DataReport, Finding
from loopos.data.solutions import ANSWER, PROMPT, STEPS, SolutionTemplate, SolutionWriter
from loopos.data.store import TextStore, TokenStore, TokenStoreBuilder
from loopos.errors import ConfigError, DataError, ModelFormatError
from loopos.files import read_json, write_json
from loopos.methods.language_model import SpanWeights, endless
from loopos.training.loop import TrainingOptions

__all__ = ["Options", "Samples", "encode_examples", "keep_template", "kept_template",
           "reasoning_report", "with_steps"]  # fmt: skip

Array = np.ndarray[Any, Any]

#: Places of examples that a warning names.
_PLACES = 5
#: How problems are written, beside a saved model.
_TEMPLATE_FILE = "reasoning.json"


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Options of a chain-of-thought run, beside those of every run.

    Attributes
    ----------
    with_steps : bool
        False leaves the steps out, and trains answers alone.
    prompt_weight, steps_weight, answer_weight : float
        How much each token of the problem, of its steps and of its answer counts in the loss.
    prompt_template : str or None
        How a problem is written, with ``{problem}`` in it; None keeps what the model has.
    step_template : str or None
        How a step is written, with ``{step}`` and a line's end behind it.
    answer_template : str or None
        How an answer is written, with ``{answer}`` and a mark before it.
    chat : bool or None
        Whether a problem is a user's turn in the model's chat template; None where there is one.
    max_length : int or None
        Tokens of an example at the most; None takes ``max_seq_len``.
    overflow : {"drop", "error"}
        What becomes of longer examples: left out and reported, or refused.
    eval_problems : int
        How many validation problems are solved at each evaluation; 0 for the loss alone.
    eval_samples : int
        Solutions for each of them that are put to the vote, beside the likeliest one; 1 for none.
    max_new_tokens : int
        Tokens of a solution at the most.
    temperature : float
        Of sampled solutions: of votes and of rounds.
    top_p : float
        Sampled solutions take the likeliest tokens of at least this share of the probability.
    generation_batch_size : int
        Solutions that are generated at once.
    rounds : int
        How often the model solves the training problems itself and is trained again, from where
        it started, on the examples and those of its solutions that reach the right answer. Rows
        may then be without reasoning.
    samples : int
        Solutions for each problem in a round.
    """

    with_steps: bool = True
    prompt_weight: float = 0.0
    steps_weight: float = 1.0
    answer_weight: float = 1.0
    prompt_template: str | None = None
    step_template: str | None = None
    answer_template: str | None = None
    chat: bool | None = None
    max_length: int | None = None
    overflow: Literal["drop", "error"] = "drop"
    eval_problems: int = 100
    eval_samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    generation_batch_size: int = 32
    rounds: int = 0
    samples: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_weight", "steps_weight", "answer_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(
                    f"training.{name}: expected a number of at least 0, found {value}"
                )
        if not (self.answer_weight or (self.steps_weight and self.with_steps)):
            raise ConfigError("training.answer_weight: with all weights 0 there is no loss")
        for name, least in (
            ("eval_problems", 0), ("eval_samples", 1), ("max_new_tokens", 1),
            ("generation_batch_size", 1), ("rounds", 0), ("samples", 1), ("max_length", 2),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"training.{name}: expected at least {least}, found {value}")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"training.temperature: expected a number above 0, found {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"training.top_p: expected a number in (0, 1], found {self.top_p}")
        if self.overflow not in ("drop", "error"):
            raise ConfigError(
                f'training.overflow: expected "drop" or "error", found {self.overflow!r}'
            )
        try:
            self.template(SolutionTemplate())
        except ConfigError as error:
            raise ConfigError(f"training.{error}") from error

    def template(self, base: SolutionTemplate) -> SolutionTemplate:
        """Return `base` with the texts that are given here."""
        given = {name: getattr(self, f"{name}_template") for name in ("prompt", "step", "answer")}
        return replace(base, **{name: text for name, text in given.items() if text is not None})


@dataclass(frozen=True)
class Samples:
    """What is trained on.

    Attributes
    ----------
    tokens, kinds : TokenStore
        Ids, and whether each is of the prompt, the steps or the answer.
    lengths : ndarray int64
        Tokens of every example, also of those left out.
    left_out : list of int
        Examples that are too long.
    """

    tokens: TokenStore
    kinds: TokenStore
    lengths: Array
    left_out: list[int]

    def weights(self, options: Options) -> SpanWeights:
        """Return how much each token counts."""
        table = np.zeros(3, dtype=np.float32)
        table[[PROMPT, STEPS, ANSWER]] = (
            options.prompt_weight, options.steps_weight, options.answer_weight,
        )  # fmt: skip
        return SpanWeights(self.kinds, table)


def encode_examples(
    data: ReasoningExamples, writer: SolutionWriter, options: Options, limit: int
) -> Samples:
    """Write examples as tokens; those in a store remember what they were encoded to last.

    Raises
    ------
    DataError
        If an example cannot be written, has nothing that counts, is longer than `limit` where that
        is an error, or none is short enough.
    """
    memo = data.texts.memo if isinstance(data.texts, TextStore) else {}
    steps_only = not (options.answer_weight or options.prompt_weight)
    key = (writer, options.with_steps, options.overflow, limit, steps_only)
    known = memo.get("reasoning")
    if known is not None and known[0] == key:
        samples: Samples = known[1]
        return samples
    lengths, left_out = [], []
    tokens, kinds = TokenStoreBuilder(), TokenStoreBuilder()
    for index, example in enumerate(data):
        steps = example.steps if options.with_steps else ()
        if steps_only and not steps:
            raise DataError(
                f"{data.where[index]}: has no steps, and nothing else counts "
                "(training.answer_weight 0)"
            )
        try:
            ids, marks = writer.solution(example.problem, steps, example.answer)
        except (ConfigError, DataError, ModelFormatError) as error:
            raise type(error)(f"{data.where[index]}: {error}") from error
        lengths.append(ids.size)
        if ids.size > limit:
            if options.overflow == "error":
                raise DataError(
                    f"{data.where[index]}: has {ids.size} tokens, more than max_length {limit}"
                )
            left_out.append(index)
            continue
        tokens.append(ids)
        kinds.append(marks)
    if not len(tokens):
        raise DataError(
            f"{data.where[0]}: neither this example nor any other fits max_length {limit}"
        )
    samples = Samples(tokens.finish(), kinds.finish(), np.array(lengths, np.int64), left_out)
    memo["reasoning"] = key, samples
    return samples


def reasoning_report(
    sets: Sequence[ReasoningExamples],
    samples: Sequence[Samples],
    limit: int,
    steps_count: bool,
    ends: bool = True,
) -> DataReport:
    """Return what a training set and perhaps a validation set hold.

    Beside what every report has: which examples are longer than `limit`, where `steps_count`
    whose answers are not in their last step, and that no token `ends` a solution.
    """
    lengths = [found.lengths for found in samples]
    validation = sets[1] if len(sets) > 1 else None
    report = DataReport.build(
        sets[0], validation, lengths[0], None, lengths[1] if validation is not None else None
    )
    warnings, dropped = list(report.warnings), report.dropped
    places = [d.where[i] for d, s in zip(sets, samples, strict=True) for i in s.left_out]
    if places:
        rows = report.rows + report.validation_rows
        warnings.append(
            f"left out are {len(places)} of {rows} examples, which have more than {limit} "
            f"tokens ({_few(places)})"
        )
        dropped = Finding(dropped.count + len(places), [*dropped.places, *places][:_PLACES])
    absent = [d.where[i] for d in sets for i, e in enumerate(d) if _answer_is_absent(e)]
    if absent and steps_count:
        warnings.append(
            f"the answers of {len(absent)} examples are not in their last step ({_few(absent)})"
        )
    if not ends:
        warnings.append(endless("a solution", templated=False))
    return replace(report, warnings=warnings, dropped=dropped)


def _answer_is_absent(example: ReasoningExample) -> bool:
    """Whether the last step says nothing of the answer."""
    if not example.steps:
        return False
    last = example.steps[-1]
    found = extract_answer(last)
    near = found is not None and same_answer(found, example.answer)
    return not near and normal_answer(example.answer) not in normal_answer(last)


def _few(places: Sequence[str]) -> str:
    return ", ".join(places[:_PLACES]) + (", ..." if len(places) > _PLACES else "")


def with_steps(data: ReasoningExamples) -> ReasoningExamples:
    """Return the examples that have steps.

    Raises
    ------
    DataError
        If none has.
    """
    chosen = [i for i, example in enumerate(data) if example.steps]
    if not chosen:
        raise DataError(f"{data.where[0]}: neither this example nor any other has steps")
    return data if len(chosen) == len(data) else data.take(chosen)


def keep_template(directory: str | Path, template: SolutionTemplate, chat: bool | None) -> None:
    """Write beside a model how the problems that it solves are written."""
    write_json(Path(directory) / _TEMPLATE_FILE, {"template": template.as_dict(), "chat": chat})


def kept_template(directory: Path) -> tuple[SolutionTemplate, bool | None] | None:
    """Return the templates beside a model, if it was saved with some."""
    file = directory / _TEMPLATE_FILE
    if not file.is_file():
        return None
    values = read_json(file, ModelFormatError)
    try:
        return SolutionTemplate(**values["template"]), values["chat"]
    except (KeyError, TypeError, ConfigError) as error:
        raise ModelFormatError(f"{file}: does not hold the templates of a model") from error
