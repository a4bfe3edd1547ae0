"""The works that are timed, built once and used by asv, `peers.py` and `check_targets.py` alike.

Weights and token ids are random: what is timed does not depend on them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import loopos
from loopos import ops
from loopos.backends import get_backend
from loopos.backends.op_cases import OpCase
from loopos.backends.testing import make_inputs, run_case
from loopos.data.reasoning import ReasoningExample, ReasoningExamples
from loopos.data.solutions import SolutionTemplate
from loopos.data.tokenizer import train_bpe
from loopos.models.heads import SequenceClassifier

Array = np.ndarray[Any, Any]


def seed_config(num_layers: int) -> loopos.TransformerConfig:
    """The sizes of the seed's shipped configurations."""
    return loopos.TransformerConfig(
        d_model=384, num_heads=8, num_layers=num_layers, d_ff=1536, vocab_size=16000
    )


SEED_FINE_TUNING = seed_config(4)
SEED_REASONING = seed_config(6)
GPT2 = loopos.TransformerConfig(
    d_model=768, num_heads=12, num_layers=12, d_ff=3072, vocab_size=50257, max_seq_len=1024
)
NUM_CLASSES = 10
FINE_TUNING_BATCHES = ((15,) * 16, (15,) * 4)
REASONING_LENGTHS = (26,) * 10
GPT2_LENGTHS = (256,) * 4
#: Sequences and their length, with 12 heads of 64.
ATTENTION_SIZES = {"L1": (1, 2048), "L2": (16, 128)}
#: Rows of the products, and the (out, in) of the linear layers of the seed's models and of GPT-2.
GEMM_ROWS = (1024, 300, 60, 15)
GEMM_LAYERS = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072))
GEMM_FORMS = ("forward", "dx", "dw")


def ragged_lengths() -> tuple[int, ...]:
    """32 lengths between 16 and 256, most of them short, as those of real texts are."""
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.normal(np.log(60), 0.8, 32)).astype(int)
    return tuple(int(n) for n in np.clip(drawn, 16, 256))


def _sequences(vocab_size: int, lengths: tuple[int, ...]) -> list[Array]:
    """Random ids; none is 0, by which PyTorch's half pads."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, vocab_size, n) for n in lengths]


@dataclass(frozen=True)
class Work:
    """One work, ready to be repeated.

    Attributes
    ----------
    run : callable
        Does it once.
    tokens : int
        Those of one run.
    model : SequenceClassifier, Transformer or None
        What is trained.
    batches : list of Batch
        Each is one step of the optimizer.
    before : callable, optional
        A part of `run` that is not timed: its seconds are taken away.
    units : int
        What is left is divided by this.
    figures : callable, optional
        What the last so many runs say of themselves, by name.
    most_runs, most_warmup : int, optional
        Of a long work: runs that are enough.
    """

    run: Callable[[], Any]
    tokens: int
    model: SequenceClassifier | loopos.Transformer | None = None
    batches: list[loopos.Batch] = field(default_factory=list)
    before: Callable[[], Any] | None = None
    units: int = 1
    figures: Callable[[int], dict[str, float]] | None = None
    most_runs: int | None = None
    most_warmup: int | None = None

    def times_s(self, runs: int, warmup: int) -> list[float]:
        """Return the seconds of each of `runs` runs, or as many as are enough, after `warmup`."""
        runs = runs if self.most_runs is None else min(runs, self.most_runs)
        warmup = warmup if self.most_warmup is None else min(warmup, self.most_warmup)
        times = spent_s(self.run, runs, warmup)
        if self.before is not None:
            untimed = spent_s(self.before, runs, 1)
            times = [t - u for t, u in zip(times, untimed, strict=True)]
        return [t / self.units for t in times]

    def first_loss(self) -> float:
        """Return the mean loss of the first batch."""
        assert self.model is not None
        loss, count = _loss(self.model, self.batches[0])
        return float(loss.data) / count


def _loss(model: Any, batch: loopos.Batch) -> tuple[Any, float]:
    if isinstance(model, SequenceClassifier):
        return ops.cross_entropy(model.logits(batch), batch.labels)
    return model.next_token_loss(batch)


def _training(model: Any, batches: list[loopos.Batch]) -> Work:
    """One epoch over `batches`, all weights, AdamW."""
    optimizer = loopos.AdamW(model.parameters(), learning_rate=1e-5)

    def run() -> None:
        for batch in batches:
            loss, count = _loss(model, batch)
            loss.backward()
            optimizer.step(scale=1 / count)
            optimizer.zero_grad()

    return Work(run, sum(batch.num_tokens for batch in batches), model, batches)


def fine_tuning_epoch() -> Work:
    """A: the seed's default fine-tuning epoch, 20 texts of 15 tokens in batches of 16 and 4."""
    body = loopos.Transformer(SEED_FINE_TUNING, seed=0)
    model = SequenceClassifier(body, num_classes=NUM_CLASSES, pooling="last")
    lengths = sum(FINE_TUNING_BATCHES, ())
    ids = _sequences(SEED_FINE_TUNING.vocab_size, lengths)
    labels = np.random.default_rng(1).integers(0, NUM_CLASSES, len(lengths))
    batches, start = [], 0
    for part in FINE_TUNING_BATCHES:
        rows = slice(start, start + len(part))
        batches.append(loopos.Batch.from_sequences(ids[rows], labels=labels[rows]))
        start = rows.stop
    return _training(model, batches)


def language_model_step(config: loopos.TransformerConfig, lengths: tuple[int, ...]) -> Work:
    """One step on one ragged batch."""
    ids = _sequences(config.vocab_size, lengths)
    return _training(loopos.Transformer(config, seed=0), [loopos.Batch.from_sequences(ids)])


def reasoning_epoch() -> Work:
    """B, the whole method: texts are encoded, batched and trained on, every step is recorded.

    Every token counts in the loss, as on the other side; so do epochs after the first.
    """
    examples = [
        ReasoningExample(f"{i}: 2 + 2 is?", ("2 + 2=4.",), "4")
        for i in range(len(REASONING_LENGTHS))
    ]
    tokenizer = train_bpe([], 257)  # a token is a byte
    method = loopos.ChainOfThought(
        loopos.Transformer(SEED_REASONING, seed=0), tokenizer,
        template=SolutionTemplate("{problem}\n", "{step}\n", "= {answer}"),
    )  # fmt: skip
    data = ReasoningExamples.of(examples)
    return whole_epochs(
        lambda count: method.fit(
            data, num_epochs=count, batch_size=16, learning_rate=1e-5, prompt_weight=1.0
        ),
        sum(REASONING_LENGTHS),
    )


def whole_epochs(fit: Callable[[int], Any], tokens: int, more: int = 16) -> Work:
    """Return a whole method's epochs after the first, of one step each.

    Parameters
    ----------
    fit : callable
        Trains for so many epochs, and returns a result with its ``history``.
    tokens : int
        Of every step, which is checked.
    more : int
        Epochs after the first.
    """

    def epochs(count: int) -> Callable[[], Any]:
        def run() -> None:
            trained = [record["tokens"] for record in fit(count).history]
            if trained != [tokens] * count:
                raise RuntimeError(f"expected {count} steps of {tokens} tokens, found {trained}")

        return run

    return Work(epochs(more + 1), tokens * more, before=epochs(1), units=more)


def attention(sequences: int, length: int) -> Work:
    """L: causal attention alone, 12 heads of 64, forward and backward."""
    rng = np.random.default_rng(0)
    tokens = sequences * length
    q, k, v, dy = (rng.standard_normal((tokens, 12, 64), dtype=np.float32) for _ in range(4))
    offsets = np.arange(sequences + 1, dtype=np.int32) * length
    scale, backend = 1 / math.sqrt(64), get_backend()

    def run() -> None:
        y, lse = backend.attention(q, k, v, offsets, True, scale)
        backend.attention_backward(dy, q, k, v, y, lse, offsets, True, scale)

    return Work(run, tokens)


#: Every work by its letter; the backend in force when it is built is the one that is timed.
WORKS: dict[str, Callable[[], Work]] = {
    "A": fine_tuning_epoch,
    "B": lambda: language_model_step(SEED_REASONING, REASONING_LENGTHS),
    "B-whole": reasoning_epoch,
    "C": lambda: language_model_step(GPT2, GPT2_LENGTHS),
    "K": lambda: language_model_step(GPT2, ragged_lengths()),
    "L1": lambda: attention(*ATTENTION_SIZES["L1"]),
    "L2": lambda: attention(*ATTENTION_SIZES["L2"]),
}
TRAINING_WORKS = ("A", "B", "C", "K")


def gemm(form: str, rows: int, out: int, width: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return one of a linear layer's three products by the backend in force, and by NumPy's BLAS.

    NumPy writes into arrays that are there already, and does not add to what `dw` holds: it has
    the less to do.
    """
    rng = np.random.default_rng(0)
    x, w, dy = (
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((rows, width), (out, width), (rows, out))
    )
    y, dx, dw, backend = np.empty_like(dy), np.empty_like(x), np.zeros_like(w), get_backend()
    added = np.zeros_like(w)

    def add_dw() -> Array:
        backend.linear_backward(dy, x, w, dw=added, need_dx=False)
        return added

    return {
        "forward": (lambda: backend.linear(x, w)[0], lambda: np.matmul(x, w.T, out=y)),
        "dx": (lambda: backend.linear_backward(dy, None, w), lambda: np.matmul(dy, w, out=dx)),
        "dw": (add_dw, lambda: np.matmul(dy.T, x, out=dw)),
    }[form]


#: Ops that meet subnormal numbers: moments that decay, activations and probabilities that vanish.
SUBNORMAL_OPS = ("adamw", "linear", "activation", "layer_norm")


def subnormal_op(name: str, scale: float) -> Callable[[], object]:
    """One of these on numbers of about this size; below 1e-38 they are subnormal in float32."""
    rng, backend = np.random.default_rng(0), get_backend()
    x, w, p = (rng.standard_normal((512, 512), dtype=np.float32) for _ in range(3))
    x *= np.float32(scale)
    g, moments = np.zeros_like(p), (x.copy(), np.abs(x))
    ones = np.ones(512, np.float32)
    return {
        # Decays by nothing, so that moments stay as small as they are.
        "adamw": lambda: backend.adamw(p, g, *moments, 1e-3, 1 - 1e-7, 1 - 1e-7, 1e-8, 0.0, 10),
        "linear": lambda: backend.linear(x, w),
        "activation": lambda: backend.activation(x, "gelu_tanh"),
        "layer_norm": lambda: backend.layer_norm(x, ones, ones, 1e-5),
    }[name]


def op(case: OpCase) -> Callable[[], object]:
    """One op forward and backward in float32 on the backend in force."""
    inputs, backend = make_inputs(case, np.float32), get_backend()
    return lambda: run_case(backend, case, inputs)


def spent_s(run: Callable[[], Any], runs: int, warmup: int) -> list[float]:
    """Return the seconds of each of `runs` calls that follow `warmup` others."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times
