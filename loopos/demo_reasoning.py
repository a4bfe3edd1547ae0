"""``loopos demo chain_of_thought``: a fresh model learns to solve word problems step by step.

Problems of three calculations are made by :mod:`loopos.data.problems`; those it is asked at the end
have no calculation in common with those it learns from. It is asked before, after, and after with
a vote over several samples. The demo fails, with exit code 1, when fewer than half are solved.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loopos.data.problems import make_problems
from loopos.data.reasoning import ReasoningExamples, read_reasoning
from loopos.data.tokenizer import train_bpe
from loopos.demo import free_directory
from loopos.display import say
from loopos.files import atomic_directory, locked_directory, write_json
from loopos.methods.chain_of_thought import ChainOfThought, Options, Solution
from loopos.models.config import TransformerConfig
from loopos.models.transformer import Transformer
from loopos.training.trackers import Callback, ConsoleProgress

__all__ = ["OPTIONS", "ReasoningResult", "learn", "run_reasoning_demo"]

#: Problems to learn from, and to be asked.
PROBLEMS, ASKED = 48_000, 200
LEVEL = 2
VOCABULARY, TOKENIZER_TEXTS = 512, 5_000
OPTIONS = Options(
    max_steps=3_000, num_epochs=1, batch_size=16, length_bucketing=True, learning_rate=2e-3,
    betas=(0.9, 0.99), weight_decay=0.05, scheduler="cosine", warmup_steps=100,
    min_learning_rate=4e-5, max_grad_norm=1.0, eval_problems=ASKED, eval_samples=10,
    temperature=0.5, max_new_tokens=110, generation_batch_size=64,
)  # fmt: skip
#: What the demo promises at least.
PROMISED = 0.5


@dataclass(frozen=True)
class ReasoningResult:
    """What the demo came to.

    Attributes
    ----------
    before, after, voted : float
        Share of the unseen problems that are solved: by the fresh model, by the trained one, and
        by its vote over ``eval_samples`` samples.
    asked : int
        How many there are.
    training_s, seconds : float
        Of the training, and of everything.
    """

    before: float
    after: float
    voted: float
    asked: int
    training_s: float
    seconds: float

    @property
    def faults(self) -> list[str]:
        """What is not as promised."""
        if self.after >= PROMISED:
            return []
        return [f"only {self.after:.1%} of the unseen problems are solved, expected {PROMISED:.0%}"]

    def lines(self) -> list[str]:
        """Return what people read."""
        rows = (
            ("before training", self.before),
            ("after training", self.after),
            (f"vote of {OPTIONS.eval_samples} samples", self.voted),
        )
        found = [f"{self.asked} unseen problems, solved"]
        found += [f"  {name:<20} {share:6.1%}" for name, share in rows]
        return [*found, f"training took {self.training_s:.0f} s, all of it {self.seconds:.0f} s"]


def fresh(examples: ReasoningExamples, seed: int) -> ChainOfThought:
    """Return a model of 0.7 million parameters with a tokenizer made of the examples."""
    texts = examples.take(range(min(TOKENIZER_TEXTS, len(examples)))).corpus
    tokenizer = train_bpe(texts, VOCABULARY, individual_digits=True)
    config = TransformerConfig(
        d_model=128, num_heads=4, num_layers=3, d_ff=512, vocab_size=tokenizer.vocab_size,
        max_seq_len=256, positions="rope",
    )  # fmt: skip
    return ChainOfThought(Transformer(config, seed=seed), tokenizer, seed=seed)


def learn(
    output_dir: Path,
    seed: int = 0,
    *,
    problems: int = PROBLEMS,
    options: Options = OPTIONS,
    callbacks: Sequence[Callback] = (),
    stop: Callable[[], bool] | None = None,
) -> tuple[ReasoningResult, list[Solution]] | None:
    """Train and ask; None when `stop` ended it.

    Parameters
    ----------
    output_dir : Path
        Gets the run, ``model/`` and ``result.json``.
    seed : int
        Of problems, weights and order.
    problems : int
        To learn from.
    options : Options
    callbacks : sequence of Callback
    stop : callable, optional
    """
    start = time.perf_counter()
    training = read_reasoning(make_problems(problems, seed=seed, levels=(LEVEL,)))
    unseen = make_problems(options.eval_problems, seed=seed, levels=(LEVEL,), split="test")
    asked = read_reasoning(unseen)
    cot = fresh(training, seed)
    before = cot.evaluate(asked, options)["accuracy"]
    trained = time.perf_counter()
    result = cot.fit(training, options=options, output_dir=output_dir, callbacks=callbacks,
                     stop=stop)  # fmt: skip
    if result.stopped_reason == "interrupted":
        return None
    training_s = time.perf_counter() - trained
    after = cot.evaluate(asked, options)
    solutions = cot.solve(list(asked.texts)[:2], options=options)
    with locked_directory(output_dir), atomic_directory(output_dir / "model") as temporary:
        cot.save(temporary)
    found = ReasoningResult(
        before, after["accuracy"], after["accuracy_voted"], len(asked), training_s,
        time.perf_counter() - start,
    )  # fmt: skip
    write_json(output_dir / "result.json", asdict(found) | {"seed": seed})
    return found, solutions


def run_reasoning_demo(
    output_dir: Path | None = None,
    *,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
    **small: Any,
) -> int:
    """Run the demo on the terminal; parameters and exit codes as :func:`loopos.demo.run_demo`."""
    wanted = output_dir or Path("outputs/demo_chain_of_thought")
    directory = free_directory(wanted)
    if directory != wanted:
        say(f"{wanted} is not empty, so this run goes to {directory}")
    say("a fresh model learns to solve word problems of three calculations")
    found = learn(directory, seed, callbacks=[ConsoleProgress()], stop=stop, **small)
    if found is None:
        print(f"interrupted; 'loopos demo' starts again (this run is in {directory})",
              file=sys.stderr)  # fmt: skip
        return 130
    result, solutions = found
    for solution in solutions:
        say()
        say(solution.problem)
        for step in solution.steps:
            say(f"  {step}")
        say(f"  answer: {solution.answer}")
    say()
    for line in result.lines():
        say(line)
    for fault in result.faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if result.faults else 0
