"""Solutions of problems, and the vote over several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loopos.data.answers import extract_answer, normal_answer
from loopos.data.solutions import SolutionTemplate, SolutionWriter
from loopos.errors import DataError
from loopos.generation import Generation, SamplingOptions, generate
from loopos.models.transformer import Transformer

__all__ = ["Solution", "answer_in", "asked_for", "voted"]


@dataclass(frozen=True)
class Solution:
    """What a model makes of a problem.

    Attributes
    ----------
    problem : str
    steps : tuple of str
        The reasoning of the sample that gave the answer and is the likeliest of those.
    answer : str or None
        None if no sample gave one.
    logprob : float
        Of that sample's tokens together, nats.
    confidence : float or None
        Share of the samples that gave this answer; None of a single one, which says nothing.
    votes : dict of str to int
        How many samples gave each answer, as :func:`loopos.data.answers.normal_answer` writes it.
    text : str
        The sample as it was generated.
    num_tokens : int
        Its tokens.
    """

    problem: str
    steps: tuple[str, ...]
    answer: str | None
    logprob: float
    confidence: float | None
    votes: dict[str, int]
    text: str
    num_tokens: int


def asked_for(
    model: Transformer,
    writer: SolutionWriter,
    problems: Sequence[str],
    sampling: SamplingOptions,
    *,
    steps: Sequence[str] = (),
    batch_size: int = 16,
    on_finish: Callable[[Generation], None] | None = None,
) -> list[Generation]:
    """Return what a model writes of problems, by problem and by sample.

    Parameters
    ----------
    model : Transformer
    writer : SolutionWriter
    problems : sequence of str
    sampling : SamplingOptions
    steps : sequence of str
        That are known already.
    batch_size : int
        Solutions that are generated at once.
    on_finish : callable, optional
        Called with each solution as it is finished.

    Raises
    ------
    DataError
        If a problem leaves no room for a solution.
    """
    prompts, limit = (
        [writer.prompt(problem, steps) for problem in problems],
        model.config.max_seq_len,
    )
    for problem, prompt in zip(problems, prompts, strict=True):
        if prompt.size >= limit:
            raise DataError(
                f"a problem of {prompt.size} tokens leaves no room for a solution "
                f"(max_seq_len {limit}): {problem[:60]!r}"
            )
    return generate(
        model, prompts, sampling, tokenizer=writer.tokenizer, stop_ids=writer.stop_ids,
        batch_size=batch_size, on_finish=on_finish,
    )  # fmt: skip


def answer_in(text: str, template: SolutionTemplate) -> str | None:
    """Return the answer that a solution gives: the marked one, else its last number, or None."""
    _, answer = template.parse(text)
    return extract_answer(text) if answer is None else answer


def voted(problem: str, generations: Sequence[Generation], template: SolutionTemplate) -> Solution:
    """Put the answers of several samples to the vote (Wang et al. 2023, self-consistency).

    Of answers with as many votes the one counts whose samples are the likeliest together.

    Parameters
    ----------
    problem : str
    generations : sequence of Generation
        One at least, with their texts.
    template : SolutionTemplate
        By which steps and answer are told apart; where nothing marks an answer, the last number is
        taken.
    """
    parsed = [template.parse(g.text or "") for g in generations]
    answers = [answer_in(g.text or "", template) for g in generations]
    keys = [None if answer is None else normal_answer(answer) for answer in answers]
    logprobs = [float(np.sum(g.logprobs, dtype=np.float64)) for g in generations]
    votes: dict[str, int] = {}
    for key in keys:
        if key is not None:
            votes[key] = votes.get(key, 0) + 1

    def likelihood(key: str | None) -> float:
        return float(np.logaddexp.reduce([p for p, k in zip(logprobs, keys, strict=True)
                                          if k == key]))  # fmt: skip

    winner = max(votes, key=lambda key: (votes[key], likelihood(key)), default=None)
    best = max((i for i, key in enumerate(keys) if key == winner), key=logprobs.__getitem__)
    share = None if len(generations) == 1 else votes.get(winner or "", 0) / len(generations)
    return Solution(
        problem, parsed[best][0], answers[best], logprobs[best], share, votes,
        generations[best].text or "", int(generations[best].ids.size),
    )  # fmt: skip
