#!/usr/bin/env python3
"""transformers' half of a comparison of generation: one work in one process, JSON on the last line.

    python benchmarks/transformers_half.py WORK [--runs 7] [--warmup 4] [--threads 2]

F: decoding with GPT-2 124M in float32, one prompt of 32 tokens; F-long: of 959. G: 16 prompts of
32. prefill: 512 tokens. Weights are random. Needs torch and transformers, nothing of loopos.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

CONTEXT, NEW_TOKENS = 1024, 64
#: Prompts, their tokens, and whether new tokens are timed.
WORKS = {
    "F": (1, 32, True),
    "F-long": (1, CONTEXT - NEW_TOKENS - 1, True),
    "G": (16, 32, True),
    "prefill": (1, 512, False),
}


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    count, tokens, decodes = WORKS[asked.work]
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.integers(1, model.config.vocab_size, tokens) for _ in range(count)])
    ids = torch.from_numpy(drawn)

    def generated(new_tokens: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            min_new_tokens=new_tokens, max_new_tokens=new_tokens,
        )  # fmt: skip
        return time.perf_counter() - start

    def prompts_read() -> float:
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    def seconds() -> float:
        if not decodes:
            return prompts_read()
        return (generated(NEW_TOKENS + 1) - generated(1)) / NEW_TOKENS

    with torch.inference_mode():
        for _ in range(min(asked.warmup, 2) if decodes else asked.warmup):
            seconds()
        times = sorted(seconds() for _ in range(asked.runs))
    middle = times[len(times) // 2]
    found = {
        "work": asked.work,
        "dtype": "float32",
        "peer": "transformers",
        "peer_s": middle,
        "min_s": times[0],
        "tokens_per_s": round((count if decodes else tokens) / middle, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
