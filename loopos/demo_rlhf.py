"""``loopos demo rlhf``: a reward model learns what people prefer, a policy learns to please it.

The shipped base model becomes a reward model on the shipped human preferences, and is judged on
held-out pairs. Then PPO lets the base model continue the openings of film reviews, such that the
reward model scores them higher while they stay close to what the base model would have written. The
demo fails, with exit code 1, when the reward model is not well above chance and above choosing the
longer response, when the mean score on held-out openings rises by less than a standard deviation of
the base model's scores, or when the KL leaves its budget.
"""

from __future__ import annotations

import itertools
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopos.autograd import Array
from loopos.data.preferences import Preferences, read_preferences
from loopos.data.tokenizer import Tokenizer, load_tokenizer
from loopos.demo import free_directory
from loopos.display import say
from loopos.files import atomic_directory, builtin, locked_directory, write_json
from loopos.methods.policy_training import Samples
from loopos.methods.ppo import Options, PPOTrainer
from loopos.methods.reinforcement import ModelReward
from loopos.methods.reward_model import Options as RewardOptions
from loopos.methods.reward_model import RewardTrainer
from loopos.methods.rollouts import collect, segment_sums
from loopos.models.weights import load_model
from loopos.training.trackers import ConsoleProgress

__all__ = ["OPTIONS", "REWARD_OPTIONS", "Answers", "RlhfResult", "answers_of", "learn",
           "openings", "run_rlhf_demo"]  # fmt: skip

BASE = "base_model"
TRAINING, HELD_OUT = "preferences_train.jsonl", "preferences_validation.jsonl"
REWARD_OPTIONS = RewardOptions(
    num_epochs=4, batch_size=16, learning_rate=1e-3, scheduler="linear", warmup_steps=20,
    weight_decay=0.1, max_grad_norm=1.0, dropout=True, normalise="mean_and_deviation",
)  # fmt: skip
OPTIONS = Options(
    max_steps=100, batch_size=64, learning_rate=2e-4, scheduler="linear", warmup_steps=5,
    max_grad_norm=1.0, kl_coefficient=0.2, kl_budget=8.0, target_kl=0.1, temperature=0.8,
    max_new_tokens=40, missing_eos_penalty=1.0, reward_normalisation="mean_std", sample_steps=20,
)  # fmt: skip
#: Responses to each held-out prompt, before and after.
PER_PROMPT = 4
#: What the demo promises at least: standard deviations gained, and pairs judged rightly.
PROMISED, ACCURACY = 1.0, 0.6
SHOWN = 3


@dataclass(frozen=True, eq=False)
class Answers:
    """What a policy makes of held-out prompts.

    Attributes
    ----------
    prompts, texts : list of str
    scores : ndarray [n]
    ended : ndarray bool [n]
        Whether a response came to its end.
    kl : float
        To the reference, nats a response.
    entropy : float
        Nats a token.
    length : float
        Tokens of a response.
    """

    prompts: list[str]
    texts: list[str]
    scores: Array
    ended: Array
    kl: float
    entropy: float
    length: float

    @property
    def figures(self) -> dict[str, float]:
        """Mean score, entropy, length, share ended, and ``distinct``.

        This is the share of different ones among all neighbouring pairs of words: low when a
        policy repeats itself.
        """
        return {
            "score": float(self.scores.mean()),
            "entropy": self.entropy,
            "length": self.length,
            "ended": float(self.ended.mean()),
            "distinct": distinct_pairs(self.texts),
        }


@dataclass(frozen=True, eq=False)
class RlhfResult:
    """What the demo came to.

    Attributes
    ----------
    accuracy, longer_accuracy : float
        Share of the held-out pairs whose chosen response scores higher, and whose longer one is
        the chosen one.
    pairs : int
        How many of them there are.
    before, after : Answers
        To held-out prompts: of the base model, and of what PPO made of it.
    kl_budget : float or None
        Nats a response.
    reward_s, ppo_s, seconds : float
        Of the reward model's training, of PPO, and of everything.
    """

    accuracy: float
    longer_accuracy: float
    pairs: int
    before: Answers
    after: Answers
    kl_budget: float | None
    reward_s: float
    ppo_s: float
    seconds: float

    @property
    def gain(self) -> float:
        """By how many of the base model's standard deviations the mean score rose."""
        before = self.before.scores
        return float((self.after.scores.mean() - before.mean()) / before.std())

    @property
    def faults(self) -> list[str]:
        """What is not as promised."""
        found = []
        bar = max(ACCURACY, self.longer_accuracy)
        if not self.accuracy >= bar:
            found.append(
                f"the reward model judges only {self.accuracy:.1%} of the held-out pairs as people "
                f"did, expected {bar:.1%}"
            )
        if not self.gain >= PROMISED:
            found.append(
                f"the mean score rose by only {self.gain:.2f} standard deviations, expected "
                f"{PROMISED:g}"
            )
        kl = self.after.kl
        if self.kl_budget is not None and not kl <= self.kl_budget:
            found.append(f"the KL is {kl:.2f} nats, above its budget {self.kl_budget:g}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        names = ("accuracy", "longer_accuracy", "pairs", "kl_budget", "reward_s", "ppo_s",
                 "seconds", "gain", "faults")  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        values |= {"prompts": len(set(self.before.prompts)), "kl": self.after.kl,
                   "deviation": float(self.before.scores.std())}  # fmt: skip
        for when, answers in (("before", self.before), ("after", self.after)):
            values |= {f"{name}_{when}": value for name, value in answers.figures.items()}
        return values

    def lines(self) -> list[str]:
        """Return what people read."""
        rows = (
            ("score", "mean score", "(those of the preferences: 0, deviation 1)"),
            ("entropy", "entropy", "nats a token"),
            ("length", "length", "tokens"),
            ("ended", "came to an end", "of all responses"),
            ("distinct", "different pairs of words", "of all"),
        )
        before, after = self.before.figures, self.after.figures
        budget = "no budget" if self.kl_budget is None else f"budget {self.kl_budget:g}"
        return [
            f"== reward model, {self.pairs} held-out pairs ==",
            f"  as people chose      {self.accuracy:6.1%}",
            f"  the longer response  {self.longer_accuracy:6.1%}",
            f"== policy, {len(self.before.texts)} responses to "
            f"{len(set(self.before.prompts))} held-out openings ==",
            f"  {'':<26}{'before':>8}{'after':>8}",
            *(f"  {name:<26}{before[key]:8.2f}{after[key]:8.2f}  {unit}"
              for key, name, unit in rows),
            f"  the mean score rose by {self.gain:.2f} standard deviations of the base model's",
            f"  KL to the base model {self.after.kl:z.2f} nats a response ({budget})",
            f"the reward model took {self.reward_s:.0f} s, PPO {self.ppo_s:.0f} s, "
            f"all of it {self.seconds:.0f} s",
        ]  # fmt: skip


class Progress(ConsoleProgress):
    """The reward model's run as any other; of PPO's, a line with its figures every few seconds."""

    def on_step(self, record: Any) -> None:
        """Move the bar; or print a line when the last one is old enough."""
        if "reward/score" not in record:
            super().on_step(record)
            return
        text = (
            f"score {record['reward/score']:+.2f}  KL {record.get('kl/mean', 0.0):z.2f}  "
            f"entropy {record['entropy']:.2f}  length {record['response/length']:.1f}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], description=text)
            return
        now = time.monotonic()
        if now - self._last >= self._interval_s:
            self._last = now
            self._print(f"step {record['step']}/{self._total}  {text}")


def openings(preferences: Preferences) -> list[str]:
    """Return the prompts, each once."""
    return sorted(set(preferences.texts))


def distinct_pairs(texts: Sequence[str]) -> float:
    """Return the share of different ones among all neighbouring pairs of words."""
    pairs = [pair for text in texts for words in [text.split()]
             for pair in itertools.pairwise(words)]  # fmt: skip
    return len(set(pairs)) / max(len(pairs), 1)


def answers_of(ppo: PPOTrainer, prompts: Sequence[str], seed: int) -> Answers:
    """Let the policy answer each prompt ``PER_PROMPT`` times, always with the same numbers."""
    rollout = ppo.sample([prompt for prompt in prompts for _ in range(PER_PROMPT)], seed=seed)
    scores, _ = ppo.reward(rollout)
    data = collect(ppo.policy, rollout, ppo.options.temperature, ppo.reference, exact=True)
    kl = segment_sums(data["exact_kl"], rollout.response_offsets)
    return Answers(
        rollout.prompts, rollout.texts, scores, rollout.ended, float(kl.mean()),
        float(data["entropy"].mean(dtype=np.float64)), float(rollout.lengths.mean()),
    )  # fmt: skip


def learn(
    output_dir: Path,
    seed: int = 0,
    *,
    reward_options: RewardOptions = REWARD_OPTIONS,
    options: Options = OPTIONS,
    prompts: int | None = None,
    on_samples: Samples | None = None,
    **run: Any,
) -> RlhfResult | None:
    """Train a reward model and, against it, a policy; None when `stop` ended it.

    Parameters
    ----------
    output_dir : Path
        Gets both runs, ``model/`` (the policy), ``reward_model/`` and ``result.json``.
    seed : int
        Of the head, order and samples.
    reward_options, options
        Of the reward model, and of PPO.
    prompts : int, optional
        Held-out prompts that are answered at the most.
    on_samples : callable, optional
        See :meth:`PPOTrainer.fit`.
    **run
        ``callbacks`` and ``stop`` of both runs.
    """
    start = time.perf_counter()
    training, held_out = (read_preferences(builtin(name)) for name in (TRAINING, HELD_OUT))
    base = builtin(BASE)
    tokenizer: Tokenizer = load_tokenizer(base)
    judge = RewardTrainer(load_model(base), tokenizer, seed=seed)
    done = judge.fit(training, options=reward_options, output_dir=output_dir / "reward", **run)
    if done.stopped_reason == "interrupted":
        return None
    judged = judge.evaluate(held_out, reward_options)
    reward_s = time.perf_counter() - start
    reward = ModelReward(judge.reward_model)
    ppo = PPOTrainer(load_model(base), tokenizer, reward, options, critic=judge.reward_model,
                     seed=seed)  # fmt: skip
    unseen = openings(held_out)[:prompts]
    before = answers_of(ppo, unseen, seed)
    began = time.perf_counter()
    done = ppo.fit(openings(training), output_dir=output_dir / "ppo", on_samples=on_samples, **run)
    if done.stopped_reason == "interrupted":
        return None
    ppo_s = time.perf_counter() - began
    after = answers_of(ppo, unseen, seed)
    found = RlhfResult(
        judged["accuracy"], judged["longer_accuracy"], judged["count"], before, after,
        options.kl_budget, reward_s, ppo_s, time.perf_counter() - start,
    )  # fmt: skip
    _save(output_dir, ppo, judge, found.as_dict() | {"seed": seed, "stopped": done.stopped_reason})
    return found


def _save(directory: Path, ppo: PPOTrainer, judge: RewardTrainer, result: dict[str, Any]) -> None:
    """Write both models and the figures."""
    with locked_directory(directory):
        with atomic_directory(directory / "model") as temporary:
            ppo.save(temporary)
        with atomic_directory(directory / "reward_model") as temporary:
            judge.save(temporary)
        write_json(directory / "result.json", result)


def side_by_side(before: Answers, after: Answers, seed: int, width: int = 46) -> list[str]:
    """Return some prompts with what came before and after, in two columns."""
    picked = np.random.default_rng(seed).choice(len(before.texts), SHOWN, replace=False)
    lines = [f"  {'before':<{width}}  after"]
    for i in picked.tolist():
        columns = []
        for answers in (before, after):
            text = f"({answers.scores[i]:+.2f}) {answers.prompts[i]}{answers.texts[i]}"
            columns.append(textwrap.wrap(" ".join(text.split()), width))
        rows = max(map(len, columns))
        left, right = ([*column, *[""] * (rows - len(column))] for column in columns)
        lines += ["", *(f"  {a:<{width}}  {b}".rstrip() for a, b in zip(left, right, strict=True))]
    return lines


def show_samples(step: int, rows: list[dict[str, Any]]) -> None:
    """Print the first samples of a step: score, prompt and response."""
    for row in rows[:SHOWN]:
        text = " ".join(f"{row['prompt']}|{row['response']}".split())
        say(f"  [{step}] {row['score']:+.2f}  {textwrap.shorten(text, 100, placeholder=' ...')}")


def run_rlhf_demo(
    output_dir: Path | None = None,
    *,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
    **small: Any,
) -> int:
    """Run the demo on the terminal; parameters and exit codes as :func:`loopos.demo.run_demo`."""
    wanted = output_dir or Path("outputs/demo_rlhf")
    directory = free_directory(wanted)
    if directory != wanted:
        say(f"{wanted} is not empty, so this run goes to {directory}")
    say("a reward model learns which of two sentences people rated higher; then PPO lets the base")
    say("model write what it likes better")
    found = learn(directory, seed, callbacks=[Progress()], on_samples=show_samples, stop=stop,
                  **small)  # fmt: skip
    if found is None:
        print(f"interrupted; 'loopos demo rlhf' starts again (this run is in {directory})",
              file=sys.stderr)  # fmt: skip
        return 130
    say("== samples: score, opening and what follows ==")
    for line in (*side_by_side(found.before, found.after, seed), *found.lines()):
        say(line)
    say("try it on an opening of your own:")
    command = ["loopos", "generate", str(directory / "model"), "--prompt", "This movie"]
    say(f"  {shlex.join(command)}")
    for fault in found.faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if found.faults else 0
