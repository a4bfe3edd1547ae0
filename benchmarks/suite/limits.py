"""The shortest time that a machine could take for a work: the model behind "% of the limit".

Two things are counted. Products, at the measured peak of float32 multiply-adds: a matrix product of
``[n, k]`` and ``[k, m]`` is ``2 n k m`` operations. And AdamW's passes over memory, at the measured
bandwidth of just that traffic. All else (norms, activations, softmax, biases, gathering embeddings,
moving activations) counts as nothing, though no program can do it in no time, so 100 % is out of
reach. The two are added: no product overlaps an update that needs its gradient. Decoding reads
every weight, and all keys and values, once for each token, at the measured bandwidth of reading;
its products can be done meanwhile. A step of reinforcement learning is such decoding, then the
products of its networks and the updates of those that are trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loopos import TransformerConfig
from loopos.methods.ppo import Options
from loopos.models.transformer import parameter_shapes

from . import methods, works
from .decoding import DECODING, WEIGHT_BYTES, Decoding
from .machine import Machine
from .reinforcement import REINFORCEMENT, Reinforcement

#: AdamW in float32 reads p, g, m and v, and writes p, m and v.
ADAMW_BYTES = 7 * 4
#: A linear layer's y, dx and dw are a product of the same size each. (The first layer's dx too: it
#: is the gradient of the embeddings, which are trained in all these works.)
LINEAR_PRODUCTS = 3
#: Causal attention: scores and outputs forward; backward the scores again, and the gradients of the
#: probabilities, v, q and k (Dao et al. 2022).
ATTENTION_PRODUCTS = 7
#: Of these, scores and outputs.
FORWARD_ATTENTION = 2


@dataclass(frozen=True)
class Cost:
    """What a work cannot do without.

    Attributes
    ----------
    flops : float
        Of products; a multiply-add is two.
    update_bytes : float
        That the optimizer moves.
    read_bytes : float
        That must be read while all the rest is done.
    """

    flops: float
    update_bytes: float = 0.0
    read_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.update_bytes + other.update_bytes,
            self.read_bytes + other.read_bytes,
        )

    def seconds(self, machine: Machine) -> float:
        """Return the shortest time on `machine`."""
        computing = self.flops / machine.fma_flops + self.update_bytes / machine.update
        return max(computing, self.read_bytes / machine.read)


def product(rows: int, out: int, width: int) -> Cost:
    """One product of a linear layer: forward, dx or dw."""
    return Cost(2.0 * rows * out * width)


def causal_attention(
    lengths: Sequence[int], heads: int, head_size: int, products: int = ATTENTION_PRODUCTS
) -> Cost:
    """Forward and backward; each product counts half of its ``T x T``, the half that is seen."""
    squares = sum(n * n for n in lengths) / 2
    return Cost(products * 2.0 * squares * heads * head_size)


def adamw(parameters: int) -> Cost:
    """One step."""
    return Cost(0.0, float(ADAMW_BYTES) * parameters)


def layer_matrices(config: TransformerConfig) -> int:
    """Numbers in the matrices of all layers: those that every token is multiplied with."""
    shapes = parameter_shapes(config).items()
    return sum(math.prod(s) for name, s in shapes if name.startswith("layers.") and len(s) == 2)


def num_parameters(config: TransformerConfig) -> int:
    """Numbers in all parameters; a tied table counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def layers(config: TransformerConfig, lengths: Sequence[int]) -> Cost:
    """Forward and backward of all layers on one ragged batch."""
    linear = Cost(LINEAR_PRODUCTS * 2.0 * sum(lengths) * layer_matrices(config))
    inside = causal_attention(lengths, config.num_heads, config.head_size)
    return linear + Cost(config.num_layers * inside.flops)


def layers_forward(config: TransformerConfig, lengths: Sequence[int]) -> Cost:
    """Forward alone."""
    linear = product(sum(lengths), 1, layer_matrices(config))
    inside = causal_attention(lengths, config.num_heads, config.head_size, FORWARD_ATTENTION)
    return linear + Cost(config.num_layers * inside.flops)


def fine_tuning_epoch() -> Cost:
    """A: the layers on each batch, the classifier on a row a text, one update a batch."""
    config, classes = works.SEED_FINE_TUNING, works.NUM_CLASSES
    head = classes * config.d_model
    total = Cost(0.0)
    for lengths in works.FINE_TUNING_BATCHES:
        total += layers(config, lengths)
        total += Cost(LINEAR_PRODUCTS * 2.0 * len(lengths) * head)
        total += adamw(num_parameters(config) + head + classes)
    return total


def language_model_step(
    config: TransformerConfig, lengths: Sequence[int], predicted: int | None = None
) -> Cost:
    """One update: the layers on every token, the head over the vocabulary on those `predicted`.

    B, C, K and pretraining predict all. Only real tokens count, padding does not: K's limit is the
    same for those who pad.
    """
    rows = sum(lengths) if predicted is None else predicted
    head = product(rows, config.vocab_size, config.d_model)
    on_head = Cost(LINEAR_PRODUCTS * head.flops)
    return layers(config, lengths) + on_head + adamw(num_parameters(config))


def scoring_step(config: TransformerConfig, lengths: Sequence[int]) -> Cost:
    """One update of a reward model or a critic, whose head is one row."""
    return layers(config, lengths) + adamw(num_parameters(config) + config.d_model + 1)


def attention(sequences: int, length: int) -> Cost:
    """L: causal attention alone, 12 heads of 64, forward and backward."""
    return causal_attention([length] * sequences, 12, 64)


def decoding(sizes: Decoding, dtype: str) -> Cost:
    """F, G: one more token of every sequence; prefill: the layers on all, the head on the last."""
    config = works.GPT2
    layer, head = layer_matrices(config), config.vocab_size * config.d_model
    rows = sizes.prompts * (1 if sizes.new_tokens else sizes.prompt_tokens)
    products = Cost(2.0 * (rows * layer + sizes.prompts * head))
    if not sizes.new_tokens:
        seen = sizes.prompt_tokens**2 / 2
        return products + Cost(2 * 2.0 * seen * config.num_layers * config.d_model)
    context = sizes.prompt_tokens + sizes.new_tokens / 2
    cached = 2 * 4 * context * sizes.prompts * config.num_layers * config.d_model
    return products + Cost(0.0, 0.0, WEIGHT_BYTES[dtype] * float(layer + head) + cached)


def sampling(sizes: Reinforcement, group: int = 1) -> list[Cost]:
    """The prompts, then a token of every response that goes on; each is bound by its own.

    `group`: responses to each prompt, which is read once.
    """
    config, prompt = sizes.config, sizes.prompt_tokens
    layer, head = layer_matrices(config), config.vocab_size * config.d_model
    weights = float(WEIGHT_BYTES[sizes.rollout_weights] * (layer + head))
    read = layers_forward(config, [prompt] * sizes.prompts)
    found = [read + product(sizes.prompts, 1, head) + Cost(0.0, 0.0, weights)]
    cached = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_size
    for done in range(1, max(sizes.response_lengths)):
        rows = group * sum(n > done for n in sizes.response_lengths)
        held = float(cached * rows * (prompt + done))
        found.append(product(rows, 1, layer + head) + Cost(0.0, 0.0, weights + held))
    return found


def learning(sizes: Reinforcement, group: int = 1, passes: int = 1, critic: bool = True) -> Cost:
    """`passes` updates of policy and critic, and what reference and reward model say before them.

    The policy's and the critic's first pass is that of the update. The head over the vocabulary
    sees the states that predict a response's token. A sequence's last token predicts nothing: the
    reward model alone reads it.
    """
    config, responses = sizes.config, list(sizes.response_lengths) * group
    whole = [sizes.prompt_tokens + n for n in responses]
    inputs = [n - 1 for n in whole]
    reference = layers_forward(config, inputs)
    reference += product(sum(responses), config.vocab_size, config.d_model)
    found = reference + layers_forward(config, whole)
    for _ in range(passes):
        found += language_model_step(config, inputs, sum(responses))
        if critic:
            found += scoring_step(config, inputs)
    return found


def sft_step() -> Cost:
    """An update from the completions alone."""
    lengths = works.REASONING_LENGTHS
    predicted = sum(n - methods.PROMPT for n in lengths)
    return language_model_step(works.SEED_REASONING, [n - 1 for n in lengths], predicted)


def pairs(sizes: Reinforcement) -> list[int]:
    """Lengths of a prompt with either answer."""
    return [sizes.prompt_tokens + n for n in sizes.response_lengths] * 2


def dpo_step(sizes: Reinforcement) -> Cost:
    """An update from pairs; what the reference says of them is known."""
    inputs = [n - 1 for n in pairs(sizes)]
    return language_model_step(sizes.config, inputs, 2 * sum(sizes.response_lengths))


def cost(work: str, dtype: str = "float32") -> Cost | None:
    """Return what a work costs: a letter, or such as "gemm dx 300x384x1536"; None has no model."""
    if work in DECODING:
        return decoding(DECODING[work], dtype)
    if work.startswith("gemm "):
        rows, out, width = map(int, work.split()[-1].split("x"))
        return product(rows, out, width)
    if work == "A":
        return fine_tuning_epoch()
    if work in works.ATTENTION_SIZES:
        return attention(*works.ATTENTION_SIZES[work])
    sizes: dict[str, tuple[TransformerConfig, Sequence[int]]] = {
        "B": (works.SEED_REASONING, works.REASONING_LENGTHS),
        "B-whole": (works.SEED_REASONING, works.REASONING_LENGTHS),
        "pretraining": (works.SEED_REASONING, works.REASONING_LENGTHS),
        "C": (works.GPT2, works.GPT2_LENGTHS),
        "K": (works.GPT2, works.ragged_lengths()),
    }
    if work in sizes:
        return language_model_step(*sizes[work])
    if work == "sft":
        return sft_step()
    if work == "reward-model":
        return scoring_step(methods.SIZES.config, pairs(methods.SIZES))
    return dpo_step(methods.SIZES) if work == "dpo" else None


def phases(work: str, dtype: str = "float32") -> list[Cost] | None:
    """Return what a work costs, one part after the other; None has no model."""
    if work in REINFORCEMENT:
        return [*sampling(REINFORCEMENT[work]), learning(REINFORCEMENT[work])]
    if work in ("RLHF", "RLHF-default"):
        sizes, passes = REINFORCEMENT["D"], 1 if work == "RLHF" else Options().ppo_epochs
        judged = scoring_step(sizes.config, pairs(sizes))
        return [judged, *sampling(sizes), learning(sizes, passes=passes)]
    if work == "grpo":
        sizes, group = methods.SIZES, methods.GROUP
        return [*sampling(sizes, group), learning(sizes, group, critic=False)]
    counted = cost(work, dtype)
    return None if counted is None else [counted]


def seconds(work: str, machine: Machine | None, dtype: str = "float32") -> float | None:
    """Return the shortest time for a work; None where it or the machine is not known."""
    counted = phases(work, dtype)
    if counted is None or machine is None:
        return None
    return sum(part.seconds(machine) for part in counted)
