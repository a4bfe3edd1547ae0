#!/usr/bin/env python3
"""Do rewards that a program computes get learnt? A pattern, a solver, word problems, by seed.

    python benchmarks/rlhf_verifiable.py [--seeds 0,1,2] [--runs pattern,solver,arithmetic]
        [--arms ppo,grpo,rloo] [--json FILE]

Each run begins with a small model after a little supervised training, so that the reward is not
always the same, and goes on with PPO, GRPO or RLOO on it.

"pattern": sentences name a date, in many forms; a regular expression gives 1 for an ISO date that
is all of the response. Asked are dates of other years. The highest mean is 1.

"solver": the prompt says how much of a substance is to be left, the response is a number, the
rate of a reaction. The reward integrates y' = -k y (1 + y) with NumPy and says how near y(1) comes.
The highest mean is known from trying every number that can be written.

"arithmetic": word problems of three calculations with numbers below ten. The supervised start saw
solutions written out step by step, half of which forget the last change; then a reward of 1 for
the right answer, for the model's own steps. Asked are problems that were in neither, greedily and
sampled once.

Prints a table of every seed, with mean and spread (the standard deviation over seeds).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import loopos
from loopos.data.answers import same_answer
from loopos.data.conversations import read_conversations
from loopos.data.reasoning import read_reasoning
from loopos.data.solutions import SolutionTemplate
from loopos.data.tokenizer import Tokenizer, train_bpe
from loopos.methods import grpo, ppo
from loopos.methods.chain_of_thought import ChainOfThought
from loopos.methods.chain_of_thought import Options as ReasoningOptions
from loopos.methods.policy_training import PolicyTrainer
from loopos.methods.sft import Options as SupervisedOptions
from loopos.methods.sft import SupervisedFineTuner
from loopos.models.config import TransformerConfig
from loopos.models.transformer import Transformer

RUNS, ARMS = ("pattern", "solver", "arithmetic"), ("ppo", "grpo", "rloo")
Scores = list[float]

# -- a pattern -----------------------------------------------------------------------------------

ISO = re.compile(r"(?:19|20)[0-9]{2}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")  # fmt: skip
#: Years of the prompts that are asked at the end; every other one from 1950 to 2049 is learnt from.
HELD_OUT_YEARS = range(1953, 2050, 5)


def pattern_reward(prompts: list[str], responses: list[str]) -> Scores:
    """Return 1 for each ISO date."""
    return [float(ISO.fullmatch(text) is not None) for text in responses]


def date_prompts(count: int, rng: np.random.Generator, held_out: bool) -> list[tuple[str, str]]:
    """Return prompts, and what a careless writer makes of each: one in four is an ISO date."""
    years = [y for y in range(1950, 2050) if (y in HELD_OUT_YEARS) == held_out]
    made = []
    for _ in range(count):
        year, month, day = (
            int(rng.choice(years)),
            int(rng.integers(1, 13)),
            int(rng.integers(1, 29)),
        )
        prompt = f"{MONTHS[month - 1]} {day}, {year} is "
        forms = (
            f"{day}.{month}.{year}",
            f"{month}/{day}/{year}",
            f"{day}/{month}/{year}",
            f"{year}/{month:02}/{day:02}",
            f"{year}-{month}-{day}",
            f"{day} {month} {year}",
        )
        iso = rng.random() < 0.25
        made.append((prompt, f"{year}-{month:02}-{day:02}" if iso else str(rng.choice(forms))))
    return made


# -- a solver ------------------------------------------------------------------------------------

#: Amounts left, in thousandths; every seventh one is asked at the end.
TARGETS = range(50, 901)
SOLVER_STEPS = 16
_NUMBER = re.compile(r"[0-9]\.[0-9]")


def left_after(rates: Any) -> Any:
    """Integrate y' = -k y (1 + y), y(0) = 1, to 1 for each k, with Runge and Kutta's method."""
    k = np.asarray(rates, np.float64)
    y, h = np.ones_like(k), 1.0 / SOLVER_STEPS

    def slope(y: Any) -> Any:
        return -k * y * (1 + y)

    for _ in range(SOLVER_STEPS):
        a = slope(y)
        b = slope(y + h / 2 * a)
        c = slope(y + h / 2 * b)
        y = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c))
    return y


def nearness(rates: Any, targets: Any) -> Any:
    """Return 1 where the target is met, 0 from 0.2 beside it on."""
    return np.maximum(0.0, 1.0 - np.abs(left_after(rates) - targets) / 0.2)


def target_of(prompt: str) -> float:
    """Return the amount that a prompt asks for."""
    return float(re.findall(r"0\.\d+", prompt)[0])


def solver_reward(prompts: list[str], responses: list[str]) -> Scores:
    """Return how near each response's rate comes; 0 for what is no number."""
    good = np.array([_NUMBER.fullmatch(text) is not None for text in responses])
    rates = np.array([float(t) if g else 0.0 for t, g in zip(responses, good, strict=True)])
    targets = np.array([target_of(prompt) for prompt in prompts])
    return list(np.where(good, nearness(rates, targets), 0.0))


def solver_maximum(prompts: Sequence[str]) -> float:
    """Return the highest mean, by trying every number that the pattern admits."""
    every = left_after(np.arange(100) / 10)
    best = [np.abs(every - target_of(prompt)).min() for prompt in prompts]
    return float(np.mean(1.0 - np.array(best) / 0.2))


def rate_prompts(count: int, rng: np.random.Generator, held_out: bool) -> list[tuple[str, str]]:
    """Return prompts, and rates up to 1.6 times too low or too high."""
    targets = [t for t in TARGETS if (t % 7 == 3) == held_out]
    grid = np.arange(100) / 10
    reached = left_after(grid)
    made = []
    for target in rng.choice(targets, count):
        rate = grid[np.abs(reached - target / 1000).argmin()]
        rough = min(9.9, rate * 1.6 ** rng.uniform(-1, 1))
        made.append((f"left 0.{target:03}: rate ", f"{rough:.1f}"))
    return made


# -- small supervised starts ---------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A programmatic reward with its prompts, and the highest mean that prompts admit."""

    reward: Callable[[list[str], list[str]], Scores]
    prompts: Callable[[int, np.random.Generator, bool], list[tuple[str, str]]]
    maximum: Callable[[Sequence[str]], float]
    max_new_tokens: int
    steps: int
    #: In a step, for all arms.
    responses: int
    options: dict[str, Any]


TASKS = {
    "pattern": Task(pattern_reward, date_prompts, lambda prompts: 1.0, 16, 100, 64, {}),
    "solver": Task(solver_reward, rate_prompts, solver_maximum, 5, 500, 128,
                   {"entropy_coefficient": 0.02}),
}  # fmt: skip
#: Examples of the supervised start; prompts asked.
SHOWN, HELD_OUT = 9_600, 256
SUPERVISED = SupervisedOptions(
    num_epochs=1, batch_size=32, learning_rate=2e-3, scheduler="cosine", warmup_steps=20,
    max_grad_norm=1.0,
)  # fmt: skip
COMMON: dict[str, Any] = {
    "num_epochs": 1, "learning_rate": 1e-3, "scheduler": "linear", "warmup_steps": 5,
    "max_grad_norm": 1.0, "temperature": 1.0, "rollout_batch_size": 128, "kl_coefficient": 0.002,
}  # fmt: skip
GROUPS: dict[str, Any] = {
    "group_size": 8, "kl_estimator": "k3", "ppo_epochs": 2, "minibatches": 2
}  # fmt: skip
LEAVE_ONE_OUT = {"baseline": "leave_one_out", "scale": "none", "loss_aggregation": "token"}
ARM_OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {"ppo_epochs": 4, "minibatches": 2, "value_coefficient": 0.5},
    "grpo": GROUPS,
    "rloo": GROUPS | LEAVE_ONE_OUT,
}


def trainer_of(
    arm: str, policy: Transformer, tokenizer: Tokenizer, reward: Any, seed: int, **changes: Any
) -> PolicyTrainer:
    """Return PPO's or GRPO's trainer with the options of an arm."""
    given = COMMON | ARM_OPTIONS[arm] | changes
    if arm == "ppo":
        return ppo.PPOTrainer(policy, tokenizer, reward, ppo.Options(**given), seed=seed)
    return grpo.GRPOTrainer(policy, tokenizer, reward, grpo.Options(**given), seed=seed)


def copy_of(model: Transformer) -> Transformer:
    """Return a model with the same weights."""
    arrays = {name: p.data.copy() for name, p in model.parameters().items()}
    return Transformer(model.config, dtype=model.dtype, arrays=arrays)


def small_model(tokenizer: Tokenizer, seed: int) -> Transformer:
    """Return a fresh model of 0.1 million parameters."""
    config = TransformerConfig(
        d_model=64, num_heads=4, num_layers=2, d_ff=256, vocab_size=tokenizer.vocab_size,
        max_seq_len=96, positions="rope",
    )  # fmt: skip
    return Transformer(config, seed=seed)


def small_start(task: Task, seed: int) -> tuple[Transformer, Tokenizer]:
    """Return a model that imitates a careless writer."""
    rows = task.prompts(SHOWN, np.random.default_rng([seed, 0]), False)
    tokenizer = train_bpe([p + r for p, r in rows[:1000]], 320, individual_digits=True)
    model = small_model(tokenizer, seed)
    examples = [{"prompt": prompt, "completion": response} for prompt, response in rows]
    SupervisedFineTuner(model, tokenizer, seed=seed).fit(
        read_conversations(examples), options=SUPERVISED
    )
    return model, tokenizer


def programmatic(run: str, seed: int, arms: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """Learn a programmatic reward; mean scores on held-out prompts as shares of the highest."""
    task, rows = TASKS[run], []
    began = time.perf_counter()
    model, tokenizer = small_start(task, seed)
    supervised_s = time.perf_counter() - began
    held_out = [p for p, _ in task.prompts(HELD_OUT, np.random.default_rng([seed, 1]), True)]
    maximum = task.maximum(held_out)
    for arm in arms:
        started = time.perf_counter()
        batch = task.responses // ARM_OPTIONS[arm].get("group_size", 1)
        trainer = trainer_of(
            arm, copy_of(model), tokenizer, task.reward, seed, batch_size=batch,
            max_new_tokens=task.max_new_tokens, **task.options,
        )  # fmt: skip
        count = steps * batch
        asked = [p for p, _ in task.prompts(count, np.random.default_rng([seed, 2]), False)]
        before = trainer.evaluate(held_out)
        trainer.fit(asked)
        after = trainer.evaluate(held_out)
        rows.append({
            "run": run, "arm": arm, "seed": seed, "before": before["reward/score"] / maximum,
            "after": after["reward/score"] / maximum, "maximum": maximum,
            "kl": after["kl/mean"], "steps": trainer.steps,
            "supervised_s": round(supervised_s, 1),
            "policy_s": round(time.perf_counter() - started, 1),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


# -- word problems -------------------------------------------------------------------------------

PROBLEMS, ASKED = 9_600, 400
#: Share of the solutions shown to the supervised start that forget the last change.
FORGOTTEN = 0.5
SOLVED_BY = ReasoningOptions(
    max_steps=1_300, num_epochs=50, batch_size=32, learning_rate=2e-3, warmup_steps=50,
    scheduler="cosine", max_grad_norm=1.0, eval_problems=ASKED, max_new_tokens=48,
    generation_batch_size=128,
)  # fmt: skip
SOLVING_STEPS = 40
SOLVING: dict[str, Any] = {
    "learning_rate": 3e-4, "batch_size": 16, "kl_coefficient": 0.0, "max_new_tokens": 48,
    "temperature": 0.5,
    "ppo_epochs": 1, "minibatches": 2,
}  # fmt: skip
PEOPLE, THINGS = ("Ann", "Ben", "Eva", "Leo", "Mia", "Tom"), ("pens", "cups", "keys", "toys")
TEMPLATE = SolutionTemplate()


def solution_of(changes: Sequence[int]) -> dict[str, Any]:
    """Return the steps, and what is there at the end, of a first amount and its changes."""
    amounts = np.cumsum(changes).tolist()
    steps = [f"{a} {'+' if c > 0 else '-'} {abs(c)} = {a + c}." for a, c in
             zip(amounts[:-1], changes[1:], strict=True)]  # fmt: skip
    return {"reasoning": steps, "answer": str(amounts[-1])}


def problems_of(seed: int, count: int, held_out: bool = False) -> list[dict[str, Any]]:
    """Return problems; those that are held out have other numbers, or in another order."""
    rng, rows = np.random.default_rng([seed, int(held_out)]), []
    while len(rows) < count:
        first, changes = int(rng.integers(0, 10)), rng.integers(-9, 10, 3).tolist()
        amounts = np.cumsum([first, *changes]).tolist()
        key = sum(n * 19**i for i, n in enumerate((first, *(c + 9 for c in changes))))
        if not (min(amounts) >= 0 and max(amounts) < 10 and all(changes)):
            continue
        if (key % 7 == 3) != held_out:
            continue
        told = ", ".join(f"{'gets' if c > 0 else 'gives'} {abs(c)}" for c in changes)
        problem = f"{rng.choice(PEOPLE)} has {first} {rng.choice(THINGS)}, {told}. How many?"
        rows.append({"problem": problem, "changes": [first, *changes],
                     **solution_of([first, *changes])})  # fmt: skip
    return rows


def told_carelessly(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the problems with solutions of which some forget the last change, and so end wrong."""
    rng, told = np.random.default_rng([seed, 3]), []
    for row in rows:
        if rng.random() >= FORGOTTEN:
            told.append(row)
            continue
        told.append(row | solution_of(row["changes"][:-1]))
    return told


def answer_reward(prompts: list[str], responses: list[str], answers: list[str]) -> Scores:
    """Return 1 for each response that marks the right answer."""
    given = [TEMPLATE.parse(text)[1] for text in responses]
    return [float(g is not None and same_answer(g, a)) for g, a in zip(given, answers, strict=True)]


def reasoning_start(seed: int, kept: Path | None) -> ChainOfThought:
    """Return a model that solves some problems; from `kept`, or left there, if that is given."""
    directory = None if kept is None else kept / f"arithmetic-{seed}"
    if directory is not None and directory.is_dir():
        return ChainOfThought(directory, seed=seed)
    told = told_carelessly(problems_of(seed, PROBLEMS), seed)
    examples = read_reasoning(
        [{k: row[k] for k in ("problem", "reasoning", "answer")} for row in told]
    )
    tokenizer = train_bpe(examples.corpus[:2000], 320, individual_digits=True)
    start = ChainOfThought(small_model(tokenizer, seed), tokenizer, seed=seed)
    start.fit(examples, options=SOLVED_BY)
    if directory is not None:
        start.save(directory)
    return start


def arithmetic(
    seed: int, arms: Sequence[str], steps: int, kept: Path | None
) -> list[dict[str, Any]]:
    """Learn to solve; accuracies on held-out problems, greedy and of one sample each."""
    problems, unseen = problems_of(seed, PROBLEMS), problems_of(seed, ASKED, True)
    start, rows = reasoning_start(seed, kept), []
    asked, weights = read_reasoning(unseen), copy_of(start.model)
    greedy = start.evaluate(asked, SOLVED_BY)["accuracy"]
    # In an order of their own: the policy writes its own solutions, and is told the answers alone.
    order = np.random.default_rng(seed).integers(0, PROBLEMS, steps * SOLVING["batch_size"])
    (texts, answers), (held_out, held_out_answers) = (
        ([TEMPLATE.prompt.replace("{problem}", row["problem"]) for row in part],
         [row["answer"] for row in part])
        for part in ([problems[i] for i in order], unseen)
    )  # fmt: skip
    for arm in arms:
        started = time.perf_counter()
        trainer = trainer_of(arm, copy_of(weights), start.tokenizer, answer_reward, seed, **SOLVING)
        before = trainer.evaluate(held_out, held_out_answers)
        trainer.fit(texts, answers=answers)
        after = trainer.evaluate(held_out, held_out_answers)
        start.model = trainer.policy
        rows.append({
            "run": "arithmetic", "arm": arm, "seed": seed, "before": greedy,
            "after": start.evaluate(asked, SOLVED_BY)["accuracy"],
            "sampled_before": before["reward/score"], "sampled_after": after["reward/score"],
            "asked": len(asked), "steps": trainer.steps,
            "policy_s": round(time.perf_counter() - started, 1),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


# -- the table -----------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each run and arm: before and after by seed, mean and spread of both."""
    lines = []
    for run, arm in dict.fromkeys((row["run"], row["arm"]) for row in rows):
        found = [row for row in rows if (row["run"], row["arm"]) == (run, arm)]
        names = ["before", "after"]
        names += ["sampled_before", "sampled_after"] if run == "arithmetic" else []
        for name in names:
            values = 100 * np.array([row[name] for row in found])
            by_seed = "  ".join(f"{row['seed']}: {v:5.1f}" for row, v in
                                zip(found, values, strict=True))  # fmt: skip
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            lines.append(
                f"{run:<11}{arm:<5}{name:<15} {by_seed}   mean {values.mean():5.1f} +- {spread:.1f}"
            )
    return lines


def main() -> None:
    """Parse arguments, learn, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--steps", type=int, help="of the policy")
    parser.add_argument("--starts", type=Path, help="keeps the starts of word problems")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    runs, arms = given.runs.split(","), given.arms.split(",")
    for option, names, known in (("--runs", runs, RUNS), ("--arms", arms, ARMS)):
        for name in names:
            if name not in known:
                parser.error(f"{option}: unknown '{name}' (known: {', '.join(known)})")
    rows: list[dict[str, Any]] = []
    for run in runs:
        for seed in map(int, given.seeds.split(",")):
            if run == "arithmetic":
                without_critic = [arm for arm in arms if arm != "ppo"]
                rows += arithmetic(seed, without_critic, given.steps or SOLVING_STEPS, given.starts)
            else:
                rows += programmatic(run, seed, arms, given.steps or TASKS[run].steps)
    print("\n".join(table(rows)))
    if given.json is not None:
        about = {
            "loopos": loopos.__version__, "python": platform.python_version(),
            "numpy": np.__version__, "backend": loopos.get_backend().name, "rows": rows,
        }  # fmt: skip
        given.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
