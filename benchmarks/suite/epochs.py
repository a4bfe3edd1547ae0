"""Epochs and steps on the documented sizes, as times and as multiples of their targets."""

import numpy as np

import loopos
from loopos.backends.threads import available_cpus, thread_limit

from . import limits, methods, targets
from .machine import NotMeasuredError, measure

BACKENDS = loopos.available_backends()
THREADS = sorted({1, available_cpus()})


def _measured(threads):
    try:
        return measure(threads)
    except NotMeasuredError:
        return None  # then what needs the limit is not a number, and the dashboard has a gap


class _Timed:
    """One work, by backend and threads."""

    params = (BACKENDS, THREADS)
    param_names = ("backend", "threads")
    warmup_time, timeout = 1.0, 900
    runs, warmup = 5, 1

    def setup_cache(self):
        return {threads: _measured(threads) for threads in THREADS}

    def setup(self, machines, backend, threads):
        loopos.set_backend(backend)
        self.limited = thread_limit(threads)
        self.limited.__enter__()
        self.timed = methods.EVERY[self.work]()
        self.timed.run()

    def teardown(self, machines, backend, threads):
        self.limited.__exit__(None, None, None)

    def _median_s(self):
        return float(np.median(self.timed.times_s(self.runs, self.warmup)))

    def time_work(self, machines, backend, threads):
        self.timed.run()

    def peakmem_work(self, machines, backend, threads):
        self.timed.run()

    def track_multiple_of_target(self, machines, backend, threads):
        target = targets.seconds(self.work, backend, machines[threads])
        return float("nan") if target is None else self._median_s() / target

    def track_fraction_of_limit(self, machines, backend, threads):
        limit = limits.seconds(self.work, machines[threads])
        return float("nan") if limit is None else limit / self._median_s()

    track_multiple_of_target.unit = "x target (below 1 is met)"
    track_fraction_of_limit.unit = "of the machine's limit"


class FineTuningEpoch(_Timed):
    """The seed's default fine-tuning epoch."""

    work = "A"


class ChainOfThoughtEpoch(_Timed):
    """The language-model step of the seed's default chain-of-thought epoch."""

    work = "B"


class RLHFEpoch(_Timed):
    """A reward model's epoch and a PPO step of the seed's default sizes, one pass."""

    work = "RLHF"


class RLHFDefaultEpoch(_Timed):
    """The same with the default of four passes over the samples."""

    work = "RLHF-default"


class PPOStep(_Timed):
    """One PPO step of the seed's default sizes: policy, reference, critic and reward model."""

    work = "D"


class _Slow(_Timed):
    number, repeat, warmup_time = 1, 3, 0.0
    runs, warmup = 3, 0


class WholeChainOfThoughtEpoch(_Slow):
    """The same by the whole method, an epoch after the first; the times are of 17 epochs."""

    work = "B-whole"


class PretrainingEpoch(_Slow):
    """By the whole method, an epoch after the first; the times are of 17 epochs."""

    work = "pretraining"


class SFTEpoch(_Slow):
    """By the whole method, an epoch after the first; the times are of 17 epochs."""

    work = "sft"


class RewardModelEpoch(_Slow):
    """By the whole method, an epoch after the first; the times are of 17 epochs."""

    work = "reward-model"


class DPOEpoch(_Slow):
    """By the whole method, an epoch after the first; the times are of 17 epochs."""

    work = "dpo"


class GRPOEpoch(_Slow):
    """By the whole method, an epoch after the first; the times are of 5 epochs."""

    work = "grpo"


class GPT2Step(_Slow):
    """GPT-2 124M, one step on 4 sequences of 256 tokens."""

    work = "C"


class GPT2RaggedStep(_Slow):
    """GPT-2 124M, one step on 32 sequences of 16 to 256 tokens."""

    work = "K"


class GPT2PPOStep(_Slow):
    """One PPO step of four GPT-2 124M, 8 prompts of 64 tokens, responses of 64."""

    work = "E"


class GPT2RaggedPPOStep(_Slow):
    """The same with responses of 4 to 64 tokens."""

    work = "E-ragged"


class GPT2MixedPPOStep(_Slow):
    """The same as the first, its responses sampled with bfloat16 weights."""

    work = "E-bfloat16"


class GPT2Int8PPOStep(_Slow):
    """The same, sampled with int8 weights."""

    work = "E-int8"


class LongAttention(_Timed):
    """Causal attention alone, forward and backward, one sequence of 2048 tokens."""

    work = "L1"


class ShortAttention(_Timed):
    """Causal attention alone, forward and backward, 16 sequences of 128 tokens."""

    work = "L2"
