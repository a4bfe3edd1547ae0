"""Works of generation: reading prompts and decoding with GPT-2 124M, random weights, by dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import loopos
from loopos.generation import generate
from loopos.models.quantized import with_weights

from .works import GPT2, Work

#: New tokens that are timed, after one that is not: it comes with the prompt.
NEW_TOKENS = 64
#: The dtypes of weights, and what llama.cpp calls them.
DTYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
#: Bytes of a weight.
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Decoding:
    """So many prompts of so many tokens; 0 new tokens means that the prompts alone are timed."""

    prompts: int
    prompt_tokens: int
    new_tokens: int = NEW_TOKENS


DECODING = {
    "F": Decoding(1, 32),
    "F-long": Decoding(1, 1024 - NEW_TOKENS - 1),
    "G": Decoding(16, 32),
    "prefill": Decoding(1, 512, 0),
}


def prompts(sizes: Decoding) -> list[np.ndarray]:
    """Random ids, the same for all sides."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, GPT2.vocab_size, sizes.prompt_tokens) for _ in range(sizes.prompts)]


def decoding(sizes: Decoding, dtype: str) -> Work:
    """Greedy, every prompt to its full length; seconds are those of one more token a prompt."""
    model = with_weights(loopos.Transformer(GPT2, seed=0), dtype)
    given = prompts(sizes)

    def generated(new_tokens: int) -> Callable[[], object]:
        return lambda: generate(
            model, given, max_new_tokens=new_tokens, temperature=0.0, batch_size=sizes.prompts
        )

    if not sizes.new_tokens:
        return Work(generated(1), sizes.prompts * sizes.prompt_tokens)
    return Work(
        generated(sizes.new_tokens + 1),
        sizes.prompts * sizes.new_tokens,
        before=generated(1),
        units=sizes.new_tokens,
    )
