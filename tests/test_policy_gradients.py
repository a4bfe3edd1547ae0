"""Toy vocabularies and horizons, where every response can be counted: gradients and KL are exact.

The expected gradient is written here from its definition, not with the trainer's own arithmetic;
the trainer's, on responses that its policy sampled, must be within four standard errors of it.
"""

import itertools

import numpy as np
import pytest

from loopos import use_backend
from loopos.autograd import backward, no_grad
from loopos.backends import available_backends
from loopos.methods import rollouts
from loopos.methods.grpo import GRPOTrainer
from loopos.methods.losses import kl_estimate
from loopos.methods.ppo import PPOTrainer
from loopos.methods.rewards import Reward
from loopos.methods.rollouts import Prompts, Rollout
from loopos.models.transformer import Transformer, TransformerConfig

FAST = "cython" if "cython" in available_backends() else "numpy"
V, HORIZON, PROMPT = 4, 2, [1, 2]
RESPONSES = list(itertools.product(range(V), repeat=HORIZON))
TABLE = np.random.default_rng(7).normal(size=(V,) * HORIZON) * 2


def toy(seed=0, vocab=V, scale=25.0, **more):
    sizes = {"d_model": 4, "num_heads": 2, "num_layers": 1, "d_ff": 6, "max_seq_len": 12} | more
    model = Transformer(TransformerConfig(vocab_size=vocab, **sizes), seed, np.float64)
    for parameter in model.parameters().values():
        if parameter.data.ndim == 2:
            parameter.data *= scale  # far from uniform
    return model


def by_table(prompts, responses):
    return [TABLE[tuple(r)] for r in responses]


def every_response():
    prompts = Prompts([np.array(PROMPT, np.int32)] * len(RESPONSES), [PROMPT] * len(RESPONSES))
    return Rollout.of(prompts, RESPONSES)


def flat(parameters):
    return np.concatenate([
        np.zeros(p.data.size) if p.grad is None else p.grad.ravel() for p in parameters
    ])  # fmt: skip


def scores_of_tokens(policy, temperature):
    """Return p(y), and the gradient of every log p(y_t): [16, T, P]."""
    rollout = every_response()
    parameters = [p for p in policy.parameters().values() if p.requires_grad]
    found = rollouts.collect(policy, rollout, temperature)["logprobs"].reshape(-1, HORIZON)
    gradients = np.zeros((*found.shape, sum(p.data.size for p in parameters)))
    for place in range(found.size):
        for parameter in parameters:
            parameter.zero_grad()
        states = rollouts.response_states(policy, rollout)
        logprobs, _ = rollouts.response_logprobs(policy, states, rollout, temperature)
        backward([(logprobs, np.eye(found.size)[place])])
        gradients[place // HORIZON, place % HORIZON] = flat(parameters)
    return np.exp(found.sum(axis=1)), gradients


def sampled_gradient(trainer, groups):
    """The gradient that the trainer's first update would apply, on its own samples."""
    with use_backend(FAST):
        rollout = trainer.sample([PROMPT] * groups)
    data = rollouts.collect(
        trainer.policy, rollout, trainer.options.temperature, None, False, trainer._values()
    )
    scored = trainer._score(rollout)
    learnt, arrays, _ = trainer._advantages(rollout, data, None, scored)
    trainer._gradients(learnt, arrays, np.arange(len(learnt)), first=True)
    return flat([p for p in trainer.policy.parameters().values() if p.requires_grad])


def require_within_4_errors(found, outcomes, chances, count):
    mean = chances @ outcomes
    error = np.sqrt(np.maximum(chances @ (outcomes - mean) ** 2, 0) / count)
    assert (error > 0).mean() > 0.3  # it is a random thing that is tested
    np.testing.assert_array_less(np.abs(found - mean), 4 * error + 1e-12)


def true_gradient(chances, tokens):
    """Of the expected score: ``sum_y p(y) r(y) grad log p(y)``."""
    return (chances * TABLE.ravel()) @ tokens.sum(axis=1)


def test_the_true_gradient_is_the_slope_of_the_expected_score():
    policy = toy()
    chances, tokens = scores_of_tokens(policy, 0.8)
    np.testing.assert_allclose(chances.sum(), 1, rtol=1e-12)
    parameters = list(policy.parameters().values())
    direction = [np.random.default_rng(i).normal(size=p.data.shape)
                 for i, p in enumerate(parameters)]  # fmt: skip
    slope = true_gradient(chances, tokens) @ np.concatenate([d.ravel() for d in direction])

    def expected(step):
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.data += step * along
        found = rollouts.collect(policy, every_response(), 0.8)["logprobs"].reshape(-1, HORIZON)
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.data -= step * along
        return np.exp(found.sum(axis=1)) @ TABLE.ravel()

    np.testing.assert_allclose((expected(1e-6) - expected(-1e-6)) / 2e-6, slope, rtol=1e-6)


def test_first_step_of_ppo_follows_the_expected_policy_gradient():
    trainer = PPOTrainer(
        toy(), None, by_table, temperature=0.8, max_new_tokens=HORIZON, kl_coefficient=0.0,
        lam=1.0, whiten_advantages=False, rollout_batch_size=512, seed=3,
    )  # fmt: skip
    trainer.critic.weight.data[:] = np.random.default_rng(1).normal(size=(1, 4))  # a baseline
    chances, tokens = scores_of_tokens(trainer.policy, 0.8)
    values = rollouts.collect(
        trainer.policy, every_response(), 0.8, values=trainer.critic.values
    )["values"].reshape(-1, HORIZON)  # fmt: skip
    assert np.ptp(values) > 0.1
    advantages = TABLE.reshape(-1, 1) - values
    outcomes = -(advantages[:, :, None] * tokens).sum(axis=1) / HORIZON
    # A baseline changes the noise, not the mean.
    np.testing.assert_allclose(
        chances @ outcomes, -true_gradient(chances, tokens) / HORIZON, atol=1e-12
    )
    found = sampled_gradient(trainer, 3000)
    require_within_4_errors(found, outcomes, chances, 3000)


GROUPS = {
    "grpo": {"scale": "group"},
    "dr_grpo": {"scale": "none", "loss_aggregation": "constant"},
    "rloo": {"scale": "none", "baseline": "leave_one_out"},
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_follow_the_expected_gradient(name):
    trainer = GRPOTrainer(
        toy(), None, by_table, temperature=0.8, max_new_tokens=HORIZON, kl_coefficient=0.0,
        group_size=2, rollout_batch_size=512, seed=5, **GROUPS[name],
    )  # fmt: skip
    chances, tokens = scores_of_tokens(trainer.policy, 0.8)
    whole, scores = tokens.sum(axis=1), TABLE.ravel()
    outcomes, pairs = [], []
    for i, j in itertools.product(range(len(scores)), repeat=2):
        a, b = scores[i] - scores[j], scores[j] - scores[i]
        if name == "grpo":
            deviation = np.std([scores[i], scores[j]], ddof=1)
            a, b = (a / 2) / (deviation + 1e-4), (b / 2) / (deviation + 1e-4)
        elif name == "dr_grpo":
            a, b = a / 2, b / 2
        outcomes.append(-(a * whole[i] + b * whole[j]) / (2 * HORIZON))
        pairs.append(chances[i] * chances[j])
    outcomes, pairs = np.array(outcomes), np.array(pairs)
    truth = -true_gradient(chances, tokens) / HORIZON
    if name == "rloo":
        np.testing.assert_allclose(pairs @ outcomes, truth, atol=1e-12)
    if name == "dr_grpo":  # each response is in its own baseline: (G - 1) / G of it
        np.testing.assert_allclose(pairs @ outcomes, truth / 2, atol=1e-12)
    found = sampled_gradient(trainer, 2000)
    require_within_4_errors(found, outcomes, pairs, 2000)


def test_exact_kl_is_the_mean_of_its_estimators():
    """Reference, point 10."""
    policy, reference = toy(0), toy(1)
    found = rollouts.collect(policy, every_response(), 0.8, reference, exact=True)
    chances = np.exp(found["logprobs"].reshape(-1, HORIZON).sum(axis=1))
    exact = chances @ found["exact_kl"].reshape(-1, HORIZON).sum(axis=1)
    assert exact > 0.1
    for estimator in ("k1", "k3"):
        kl = kl_estimate(found["logprobs"], found["ref_logprobs"], estimator)
        mean = chances @ kl.reshape(-1, HORIZON).sum(axis=1)
        np.testing.assert_allclose(mean, exact, rtol=1e-10)
    trainer = PPOTrainer(
        policy, None, by_table, reference=reference, temperature=0.8, max_new_tokens=HORIZON,
        rollout_batch_size=512,
    )  # fmt: skip
    rollout = trainer.sample([PROMPT] * 3000)
    sampled = rollouts.collect(policy, rollout, 0.8, reference)
    k1 = (sampled["logprobs"] - sampled["ref_logprobs"]).reshape(-1, HORIZON).sum(axis=1)
    assert abs(k1.mean() - exact) < 4 * k1.std() / np.sqrt(3000)


# -- the whole network -----------------------------------------------------------------------------

RAGGED = ([3, 1], [4], [2, 2, 5, 1, 3], [5, 5, 1])


def ragged_rollout(count=4):
    prompts = [np.array(p, np.int32) for p in ([1, 2], [3], [2, 4, 1], [5])][:count]
    return Rollout.of(Prompts(prompts, [p.tolist() for p in prompts]), RAGGED[:count])


def first_tokens(prompts, responses):
    return [r[0] / 3 - len(r) for r in responses]


def trainer_of(kind, **options):
    common = {"temperature": 0.9, "max_new_tokens": 6, "entropy_coefficient": 0.05, "seed": 2}
    policy = toy(0, 6, 15.0)
    reference = toy(1, 6, 15.0)
    cls = PPOTrainer if kind == "ppo" else GRPOTrainer
    extra = {} if kind == "ppo" else {"group_size": 2}
    return cls(policy, None, first_tokens, reference=reference, **common | extra | options)


def gradient_and_slope(trainer, rollout):
    """Both along one random direction, after the policy has moved away from its samples."""
    rng = np.random.default_rng(4)
    if isinstance(trainer, PPOTrainer):
        trainer.critic.weight.data[:] = rng.normal(size=trainer.critic.weight.shape)
    o = trainer.options
    data = rollouts.collect(
        trainer.policy, rollout, o.temperature, trainer.reference,
        o.kl_estimator == "exact", trainer._values(),
    )  # fmt: skip
    scored = trainer._score(rollout)
    learnt, arrays, _ = trainer._advantages(rollout, data, trainer._kl(data), scored)
    parameters = [p for p in trainer.parameters().values() if p.requires_grad]
    for parameter in parameters:
        parameter.data += 0.05 * rng.normal(size=parameter.data.shape)
    everyone = np.arange(len(learnt))
    found = trainer._gradients(learnt, arrays, everyone, first=False)
    direction = [rng.normal(size=p.data.shape) for p in parameters]
    gradient = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True)
                   if p.grad is not None)  # fmt: skip

    def loss(step):
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.data += step * along
        value = trainer._gradients(learnt, arrays, everyone, first=False)["loss"]
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.data -= step * along
        return value

    return gradient, (loss(1e-6) - loss(-1e-6)) / 2e-6, found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ppo", {}),
        ("ppo", {"critic": "shared", "value_coefficient": 0.7}),
        ("ppo", {"kl_estimator": "exact", "value_clip": None, "clip_epsilon_high": 0.4}),
        ("ppo", {"gradient_accumulation_steps": 3}),
        ("ppo", {"gradient_checkpointing": True}),
        ("grpo", {}),
        ("grpo", {"loss_aggregation": "token", "kl_estimator": "k2"}),
        ("grpo", {"loss_aggregation": "constant", "kl_in": "reward", "kl_estimator": "k1"}),
    ],
)
def test_gradients_through_the_whole_network(kind, options):
    gradient, slope, found = gradient_and_slope(trainer_of(kind, **options), ragged_rollout())
    assert found["approx_kl"] > 1e-3  # the policy has moved, so clipping is part of it
    assert found["clipped"] > 0
    np.testing.assert_allclose(gradient, slope, rtol=1e-6)


def test_gradients_with_adapters():
    from loopos.models.lora import LoraConfig, add_lora

    policy = add_lora(toy(0, 6, 15.0), LoraConfig(rank=2))
    trainer = PPOTrainer(policy, None, first_tokens, temperature=0.9, max_new_tokens=6)
    gradient, slope, _ = gradient_and_slope(trainer, ragged_rollout())
    np.testing.assert_allclose(gradient, slope, rtol=1e-6)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
@pytest.mark.parametrize("passes", [2, 4])
def test_passes_make_one_gradient(kind, passes):
    """Reference, "wrong denominators under accumulation": sums and counts, divided once."""
    whole = gradient_and_slope(trainer_of(kind), ragged_rollout())
    cut = gradient_and_slope(
        trainer_of(kind, gradient_accumulation_steps=passes), ragged_rollout()
    )  # fmt: skip
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-12)
    for name in whole[2]:
        np.testing.assert_allclose(cut[2][name], whole[2][name], rtol=1e-12)


def test_a_response_is_the_same_in_any_company():
    """Values, log-probabilities and scores do not depend on the rest of the batch."""
    policy, rollout = toy(0, 6, 15.0), ragged_rollout()
    together = rollouts.collect(policy, rollout, 0.9, toy(1, 6, 15.0), exact=True)
    for index in range(4):
        single = rollout.take(np.array([index]))
        alone = rollouts.collect(policy, single, 0.9, toy(1, 6, 15.0), exact=True)
        for name, array in together.items():
            part = rollouts.take_segments(array, rollout.response_offsets, np.array([index]))
            np.testing.assert_allclose(alone[name], part, rtol=1e-12)
        np.testing.assert_array_equal(single.targets, RAGGED[index])
    scores, _ = Reward(first_tokens)(rollout)
    np.testing.assert_allclose(scores, first_tokens(None, RAGGED))


def test_rows_are_those_before_the_response():
    """Log-probabilities equal those of whole logits over every token, at the next tokens."""
    policy, rollout = toy(0, 6, 15.0), ragged_rollout()
    found = rollouts.collect(policy, rollout, 0.9)["logprobs"]
    expected = []
    with no_grad(), use_backend("numpy"):
        for index, response in enumerate(RAGGED):
            tokens = rollout.tokens[slice(*rollout.offsets[index : index + 2])]
            from loopos.data.batch import Batch

            logits = policy.forward(Batch.from_sequences([tokens])).data / 0.9
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            start = len(tokens) - len(response)
            expected += [logits[start + t - 1, token] for t, token in enumerate(response)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
