#!/usr/bin/env python3
"""llama.cpp's half of a comparison of generation: one work in one process, JSON on the last line.

    python benchmarks/llama_half.py WORK [--dtype float32|bfloat16|int8] [--runs 7] [--warmup 4]
        [--threads 2]

F: decoding with GPT-2 124M, one prompt of 32 tokens; F-long: of 959. G: 16 prompts of 32. prefill:
512 tokens. Weights are random and written as GGUF, int8 as q8_0. Needs llama-cpp-python, gguf and
NumPy, and nothing of loopos.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

WIDTH, LAYERS, HEADS, VOCAB, CONTEXT = 768, 12, 12, 50257, 1024
NEW_TOKENS = 64
#: Prompts, their tokens, and whether new tokens are timed.
WORKS = {
    "F": (1, 32, True),
    "F-long": (1, CONTEXT - NEW_TOKENS - 1, True),
    "G": (16, 32, True),
    "prefill": (1, 512, False),
}
TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def write_model(path: Path, dtype: str) -> None:
    """Write GPT-2 124M with random weights; norms, biases and positions stay float32."""
    rng, (kind, file_type) = np.random.default_rng(0), TYPES[dtype]
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(VOCAB)

    def matrix(name: str, *shape: int) -> None:
        weights = (rng.standard_normal(shape) * 0.02).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(weights, kind), raw_dtype=kind)

    def vector(name: str, size: int, value: float = 0.0) -> None:
        writer.add_tensor(name, np.full(size, value, np.float32))

    matrix("token_embd.weight", VOCAB, WIDTH)
    writer.add_tensor(
        "position_embd.weight", (rng.standard_normal((CONTEXT, WIDTH)) * 0.02).astype(np.float32)
    )
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            vector(f"blk.{i}.{norm}.weight", WIDTH, 1.0)
            vector(f"blk.{i}.{norm}.bias", WIDTH)
        for name, out, width in (
            ("attn_qkv", 3 * WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_up", 4 * WIDTH, WIDTH),
            ("ffn_down", WIDTH, 4 * WIDTH),
        ):
            matrix(f"blk.{i}.{name}.weight", out, width)
            vector(f"blk.{i}.{name}.bias", out)
    vector("output_norm.weight", WIDTH, 1.0)
    vector("output_norm.bias", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Runner:
    """A context of llama.cpp, and one greedy step of all its sequences."""

    def __init__(self, path: Path, sequences: int, tokens: int, threads: int):
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise SystemExit("llama.cpp could not load the model")
        given = llama_cpp.llama_context_default_params()
        given.n_ctx, given.n_seq_max = sequences * CONTEXT, sequences
        given.n_batch = given.n_ubatch = max(512, sequences * tokens)
        given.n_threads = given.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, given)
        if not self.context:
            raise SystemExit("llama.cpp could not make a context")
        self.batch = llama_cpp.llama_batch_init(sequences * max(tokens, 1), 0, 1)
        self.sequences = sequences

    def forward(self, rows: list[list[int]], position: int) -> list[int]:
        """Read tokens of every sequence; return the likeliest next one of each."""
        batch, at = self.batch, 0
        ends = []
        for sequence, ids in enumerate(rows):
            for offset, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, position + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = offset == len(ids) - 1
                at += 1
            ends.append(at - 1)
        batch.n_tokens = at
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        found = []
        for end in ends:
            logits = llama_cpp.llama_get_logits_ith(self.context, end)
            address = ctypes.addressof(logits.contents)
            row = np.ctypeslib.as_array((ctypes.c_float * VOCAB).from_address(address))
            found.append(int(row.argmax()))
        return found

    def forget(self) -> None:
        """Empty the cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)


def seconds(runner: Runner, prompts: list[list[int]], decodes: bool) -> float:
    """Return the seconds of the prompts, or of one more token a prompt after them."""
    runner.forget()
    start = time.perf_counter()
    following, position = runner.forward(prompts, 0), len(prompts[0])
    if not decodes:
        return time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(NEW_TOKENS):
        following = runner.forward([[token] for token in following], position)
        position += 1
    return (time.perf_counter() - start) / NEW_TOKENS


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--dtype", choices=TYPES, default="float32")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    count, tokens, decodes = WORKS[asked.work]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, tokens).tolist() for _ in range(count)]
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "gpt2.gguf"
        write_model(path, asked.dtype)
        runner = Runner(path, count, tokens, asked.threads)
    for _ in range(min(asked.warmup, 2)):
        seconds(runner, prompts, decodes)
    times = sorted(seconds(runner, prompts, decodes) for _ in range(asked.runs))
    middle = times[len(times) // 2]
    found: dict[str, Any] = {
        "work": asked.work,
        "dtype": asked.dtype,
        "peer": "llama.cpp",
        "peer_s": middle,
        "min_s": times[0],
        "tokens_per_s": round((count if decodes else tokens) / middle, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
