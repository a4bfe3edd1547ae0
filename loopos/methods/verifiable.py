"""GRPO on problems whose answers can be checked: the reward is that the answer is right.

    grpo = ReasoningGRPO(loopos.load_model("chain_of_thought/model"), tokenizer)
    grpo.fit("problems.jsonl", num_epochs=1)

No steps need be known: the model finds its own. Problems are written, and answers read, as
:class:`loopos.methods.chain_of_thought.ChainOfThought` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loopos.autograd import Array
from loopos.data.answers import same_answer
from loopos.data.readers import Source, Texts
from loopos.data.reasoning import ReasoningExamples, read_reasoning
from loopos.data.report import DataReport
from loopos.data.solutions import SolutionTemplate, SolutionWriter
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, DataError
from loopos.generation import SamplingOptions
from loopos.methods.common import RunArguments, with_overrides
from loopos.methods.grpo import GRPOTrainer
from loopos.methods.grpo import Options as GRPOOptions
from loopos.methods.language_model import require_language_model
from loopos.methods.policy_options import require_numbers
from loopos.methods.policy_runs import StartFile, begun, sample_callbacks
from loopos.methods.reasoning import keep_template, kept_template
from loopos.methods.solving import answer_in, asked_for
from loopos.models.transformer import Transformer
from loopos.training.loop import TrainResult
from loopos.training.trackers import Callback, tell_samples

__all__ = ["INDIVIDUAL_DIGITS", "MAKE_TAKES", "Options", "ReasoningGRPO", "make", "read"]

#: A fresh tokenizer has a token for each digit, so that numbers are read as they are calculated.
INDIVIDUAL_DIGITS = True
#: What :func:`make` is told beside the model.
MAKE_TAKES = ("pretrained_weights",)


@dataclass(frozen=True)
class Options(GRPOOptions):
    """Options of a GRPO run on problems with answers.

    Attributes
    ----------
    prompt_template : str or None
        How a problem is written, with ``{problem}`` in it; None keeps what the model has.
    step_template : str or None
        How a step is written, with ``{step}`` and a line's end behind it.
    answer_template : str or None
        How an answer is written, with ``{answer}`` and a mark before it.
    chat : bool or None
        Whether a problem is a user's turn in the model's chat template; None where there is one.
    eval_problems : int
        How many validation problems are solved at each evaluation.
    max_new_tokens : int
        Tokens of a solution at the most.
    sample_steps : int or None
        Steps between two tables of samples, which are shown and written to ``samples.jsonl``.
    """

    prompt_template: str | None = None
    step_template: str | None = None
    answer_template: str | None = None
    chat: bool | None = None
    eval_problems: int = 100
    max_new_tokens: int = 128
    sample_steps: int | None = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(self, {"eval_problems": (True, lambda n: n >= 1, "at least 1")})
        try:
            self.template(SolutionTemplate())
        except ConfigError as error:
            raise ConfigError(f"training.{error}") from error

    def template(self, base: SolutionTemplate) -> SolutionTemplate:
        """Return `base` with the texts that are given here."""
        given = {name: getattr(self, f"{name}_template") for name in ("prompt", "step", "answer")}
        return replace(base, **{name: text for name, text in given.items() if text is not None})


class ReasoningGRPO:
    """Trains a language model on problems by whether its answers are right.

    Parameters
    ----------
    model : Transformer
        Trained in place.
    tokenizer : Tokenizer
    template : SolutionTemplate, optional
        How problems, steps and answers are written.
    chat : bool, optional
        Whether problems are turns in the model's chat template; by default where it has one.
    seed : int

    Raises
    ------
    ConfigError
        If the model is no language model, or has no chat template where `chat` is True.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        template: SolutionTemplate | None = None,
        chat: bool | None = None,
        seed: int = 0,
    ):
        require_language_model(model, tokenizer, "GRPO")
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self._write = SolutionWriter(tokenizer, template or SolutionTemplate(), chat)
        self._chat = chat
        self._start: dict[str, Any] = {}
        self._grpo: GRPOTrainer | None = None

    def fit(
        self,
        training_data: ReasoningExamples | Source,
        validation_data: ReasoningExamples | Source | None = None,
        options: Options | None = None,
        *,
        output_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = False,
        stop: Callable[[], bool] | None = None,
        run_config: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> TrainResult:
        """Train on problems; parameters as :meth:`loopos.FineTuner.fit`.

        Raises
        ------
        DataError
            If a problem leaves no room for a solution.
        ConfigError
            If an option has no such name or value.
        LooposError, NumericalError
            As :meth:`loopos.methods.ppo.PPOTrainer.fit`.
        """
        options = with_overrides(options or Options(), overrides)
        self._take_templates(options)
        training = _examples(training_data)
        run = RunArguments(
            output_dir=output_dir, callbacks=callbacks, resume=resume, stop=stop,
            run_config=run_config,
        )  # fmt: skip
        held_out = None
        if validation_data is not None:
            held_out = _some(_examples(validation_data), options)
        stops = tuple(dict.fromkeys([*options.stop_ids, *self._write.stop_ids]))
        trainer = self._grpo = GRPOTrainer(
            self.model, self.tokenizer, self._right, replace(options, stop_ids=stops),
            seed=self.seed,
        )  # fmt: skip
        self.model = trainer.policy
        root = None if output_dir is None else Path(output_dir)
        start = StartFile(
            root, dict if held_out is None else lambda: self._measure(held_out, options)
        )
        told = sample_callbacks(root, callbacks, start)
        result = trainer.fit(
            self._prompts(training),
            None if held_out is None else self._prompts(held_out),
            answers=_answers(training),
            validation_answers=None if held_out is None else _answers(held_out),
            on_samples=tell_samples(told),
            **RunArguments(**{**run, "callbacks": told, "resume": begun(root, run)}),
        )
        self._start = start.figures
        return result

    def _right(
        self, prompts: Sequence[Any], responses: Sequence[str], answers: Sequence[str]
    ) -> list[float]:
        """Return 1 for each response with the right answer, 0 for the others."""
        return [float(self._is_right(r, a)) for r, a in zip(responses, answers, strict=True)]

    def _is_right(self, text: str, answer: str) -> bool:
        given = answer_in(text, self._write.template)
        return given is not None and same_answer(given, answer)

    def _take_templates(self, options: Options) -> None:
        template = options.template(self._write.template)
        if template != self._write.template or options.chat is not None:
            self._chat = self._chat if options.chat is None else options.chat
            self._write = SolutionWriter(self.tokenizer, template, self._chat)

    def _prompts(self, data: ReasoningExamples) -> list[Array]:
        limit, prompts = self.model.config.max_seq_len - 1, []
        for index, problem in enumerate(data.texts):
            ids = self._write.prompt(problem)
            if ids.size > limit:
                raise DataError(
                    f"{data.where[index]}: the problem has {ids.size} tokens, which leaves no room "
                    f"for a solution (at most {limit})"
                )
            prompts.append(ids)
        return prompts

    def report(
        self,
        training: ReasoningExamples,
        validation: ReasoningExamples | None = None,
        options: Options | None = None,
    ) -> DataReport:
        """Return what the data holds; lengths are those of the problems as they are asked."""
        self._take_templates(options or Options())
        sets = [training] if validation is None else [training, validation]
        lengths = [np.array([ids.size for ids in self._prompts(data)]) for data in sets]
        return DataReport.build(
            training, validation, lengths[0], None, lengths[1] if len(lengths) > 1 else None
        )

    def evaluate(
        self, data: ReasoningExamples | Source, options: Options | None = None
    ) -> dict[str, Any]:
        """Return how many problems are solved by the likeliest solution.

        Returns
        -------
        dict
            ``accuracy``, ``tokens_per_solution``, ``ended`` (share of solutions), ``asked`` and
            ``solved``; of a run also ``accuracy_before``, of its start, and ``score``, the share of
            sampled solutions that are right, with ``kl`` to the reference where there is one.
        """
        options = options or Options()
        self._take_templates(options)
        some = _some(_examples(data), options)
        figures = self._measure(some, options)
        if "accuracy" in self._start:
            figures["accuracy_before"] = self._start["accuracy"]
        if self._grpo is not None:
            sampled = self._grpo.evaluate(self._prompts(some), _answers(some))
            figures["score"] = sampled["reward/score"]
            if "kl/mean" in sampled:
                figures["kl"] = sampled["kl/mean"]
        return figures

    def _measure(self, data: ReasoningExamples, options: Options) -> dict[str, Any]:
        sampling = SamplingOptions(
            max_new_tokens=options.max_new_tokens, temperature=0.0, seed=self.seed
        )
        found = asked_for(
            self.model, self._write, list(data.texts), sampling,
            batch_size=options.rollout_batch_size,
        )  # fmt: skip
        right = self._right((), [g.text or "" for g in found], _answers(data))
        return {
            "accuracy": float(np.mean(right)),
            "tokens_per_solution": float(np.mean([g.ids.size for g in found])),
            "ended": float(np.mean([g.stop_reason == "stop_token" for g in found])),
            "asked": len(right),
            "solved": int(sum(right)),
        }

    def save(self, directory: str | Path) -> None:
        """Write model, tokenizer and templates: what :class:`ChainOfThought` loads, too."""
        self.model.save(directory, self.tokenizer)
        keep_template(directory, self._write.template, self._chat)


def _examples(data: ReasoningExamples | Source) -> ReasoningExamples:
    return data if isinstance(data, ReasoningExamples) else read_reasoning(data, need_steps=False)


def _some(data: ReasoningExamples, options: Options) -> ReasoningExamples:
    return data.take(range(min(options.eval_problems, len(data))))


def _answers(data: ReasoningExamples) -> list[str]:
    return [example.answer for example in data]


def read(
    source: Source,
    text_field: str,
    label_field: str,
    *,
    options: Options,
    like: Texts | None = None,
    num_classes: int | None = None,
) -> ReasoningExamples:
    """Read problems for a run.

    Raises
    ------
    ConfigError
        If `num_classes` is given: a language model has none.
    """
    if num_classes is not None:
        raise ConfigError("model.num_classes: a language model has no classes")
    return _examples(source)


def make(
    model: Transformer,
    tokenizer: Tokenizer,
    training: ReasoningExamples,
    *,
    num_classes: int | None = None,
    seed: int = 0,
    pretrained_weights: str | None = None,
) -> ReasoningGRPO:
    """Make the trainer of a run, which asks as the model in `pretrained_weights` was asked."""
    kept = None if pretrained_weights is None else kept_template(Path(pretrained_weights))
    template, chat = (None, None) if kept is None else kept
    return ReasoningGRPO(model, tokenizer, template=template, chat=chat, seed=seed)
