"""How a problem, its steps and its answer are written as tokens, and read back from text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loopos.data.answers import extract_answer
from loopos.data.chat import ChatTemplate
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, nearest

__all__ = ["ANSWER", "PROMPT", "STEPS", "SolutionTemplate", "SolutionWriter"]

Array = np.ndarray[Any, Any]

#: The kinds of tokens.
PROMPT, STEPS, ANSWER = 0, 1, 2
_NAME = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class SolutionTemplate:
    """The texts around a problem, each of its steps, and its answer.

    Attributes
    ----------
    prompt : str
        With ``{problem}`` in it.
    step : str
        With ``{step}`` in it; its end divides steps.
    answer : str
        With ``{answer}`` in it; what stands before marks the answer.

    Raises
    ------
    ConfigError
        If the name is missing or there is another one; nothing divides steps; or nothing marks
        the answer.
    """

    prompt: str = "Problem: {problem}\nReasoning:\n"
    step: str = "{step}\n"
    answer: str = "Answer: {answer}"

    def __post_init__(self) -> None:
        for key, name in (("prompt", "problem"), ("step", "step"), ("answer", "answer")):
            text = getattr(self, key)
            found = _NAME.findall(text)
            for other in found:
                if other != name:
                    hint = nearest(other, [name])
                    raise ConfigError(
                        f"{key}_template: expected {{{name}}} alone, found {{{other}}}{hint}"
                    )
            if len(found) != 1:
                raise ConfigError(
                    f"{key}_template: expected {{{name}}} once, found it {len(found)} times"
                )
        if "\n" not in self.step_end:
            raise ConfigError("step_template: expected a line's end after {step}, found none")
        if not self.marker:
            raise ConfigError("answer_template: expected a mark before {answer}, found none")

    @property
    def step_end(self) -> str:
        """What stands behind a step."""
        return self.step.partition("{step}")[2]

    @property
    def marker(self) -> str:
        """What stands before an answer."""
        return self.answer.partition("{answer}")[0].strip()

    def steps_text(self, steps: Sequence[str]) -> str:
        """Return steps as they are written."""
        return "".join(self.step.replace("{step}", step) for step in steps)

    def answer_text(self, answer: str) -> str:
        """Return an answer as it is written."""
        return self.answer.replace("{answer}", answer)

    def parse(self, text: str) -> tuple[tuple[str, ...], str | None]:
        """Return the steps and the answer that a text holds; None where nothing marks one."""
        before, mark, _ = text.rpartition(self.marker)
        opening, _, closing = (part.strip() for part in self.step.partition("{step}"))
        lines = (line.strip() for line in (before if mark else text).splitlines())
        found = (line.removeprefix(opening).removesuffix(closing).strip() for line in lines)
        answer = extract_answer(text, self.marker) if mark else None
        if answer is not None:
            answer = answer.removesuffix(self._answer_end).strip() or None
        return tuple(step for step in found if step), answer

    @property
    def _answer_end(self) -> str:
        """What stands behind an answer in its line."""
        return self.answer.partition("{answer}")[2].split("\n")[0].strip()

    def as_dict(self) -> dict[str, str]:
        """Return the three texts by name."""
        return asdict(self)


class SolutionWriter:
    """Writes problems and solutions as tokens, and knows which token is what.

    The prompt is encoded alone, exactly as it is when the model is asked, and steps and answer
    after it, so that what is trained on continues what is generated from. A problem may be wrapped
    as a user's turn in the model's chat template.

    Parameters
    ----------
    tokenizer : Tokenizer
    template : SolutionTemplate
    chat : bool or None
        Whether the chat template is used; None where the tokenizer has one.

    Raises
    ------
    ConfigError
        If `chat` is True and there is no chat template.
    ModelFormatError
        If the chat template cannot be read.
    """

    def __init__(self, tokenizer: Tokenizer, template: SolutionTemplate, chat: bool | None = None):
        self.tokenizer, self.template = tokenizer, template
        wanted = tokenizer.chat_template is not None if chat is None else chat
        self._chat = ChatTemplate(tokenizer) if wanted else None
        ends = () if self._chat is None else self._chat.stop_ids
        if not ends and tokenizer.eos_id is not None:
            ends = (tokenizer.eos_id,)
        #: The tokens that end a solution; the first one is written.
        self.stop_ids: tuple[int, ...] = ends

    def prompt(self, problem: str, steps: Sequence[str] = ()) -> Array:
        """Return the tokens after which a model goes on to solve a problem, int32 [n]."""
        text = self.template.prompt.replace("{problem}", problem)
        if self._chat is not None:
            ids = self._chat.prompt([{"role": "user", "content": text}])
        else:
            (ids,) = self.tokenizer.encode_open([text])
        if not steps:
            return ids
        before, _ = self.tokenizer.encode_with_offsets(self.template.steps_text(steps))
        return np.concatenate([ids, before])

    def solution(self, problem: str, steps: Sequence[str], answer: str) -> tuple[Array, Array]:
        """Return the tokens of a problem with its solution, and the kind of each, int32 [n]."""
        before = self.prompt(problem)
        ids, kinds = self._completion(self.template.steps_text(steps), answer)
        end = np.array(self.stop_ids[:1], dtype=np.int32)
        kinds = np.concatenate(
            [np.full(before.size, PROMPT), kinds, np.full(end.size, ANSWER)]
        ).astype(np.int32)
        return np.concatenate([before, ids, end]), kinds

    def _completion(self, steps: str, answer: str) -> tuple[Array, Array]:
        """Return the tokens of steps and answer, encoded apart where one would stand in both."""
        text = steps + self.template.answer_text(answer)
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        starts, ends = offsets.T
        edge = len(steps)
        if not ((starts < edge) & (ends > edge)).any():
            return ids, np.where(starts < edge, STEPS, ANSWER)
        parts = [self.tokenizer.encode_with_offsets(part)[0] for part in (steps, text[edge:])]
        kinds = [
            np.full(part.size, kind) for part, kind in zip(parts, (STEPS, ANSWER), strict=True)
        ]
        return np.concatenate(parts), np.concatenate(kinds)
