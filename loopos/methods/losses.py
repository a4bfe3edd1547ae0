"""The arithmetic of reinforcement and preference learning: ndarrays in, ndarrays out, no model.

A loss returns ``(sum, count, gradient...)``: the sum over its own tokens, sequences or pairs, how
many there were, and the gradient of the *sum* with respect to its direct inputs. Divide once, by
the total of the counts of a whole step. Everything works in float32 and float64; whole numbers,
such as rewards of 0 and 1, count as float64; sums are added in float64. Tokens are ragged: an array
holds those that count, sequence after sequence, and nothing else. What holds no numbers, or another
number of them, is refused with an InputError (a ValueError).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from loopos.backends import get_backend
from loopos.errors import ConfigError, InputError, nearest
from loopos.methods.loss_inputs import floats, require_at_least, segments

__all__ = [
    "DPO_LOSSES",
    "KL_ESTIMATORS",
    "adapted_kl_coefficient",
    "bradley_terry_loss_and_grad",
    "centering_loss_and_grad",
    "dpo_loss_and_grad",
    "gae",
    "grpo_advantages",
    "kl_estimate",
    "kl_loss_and_grad",
    "kto_loss_and_grad",
    "orpo_loss_and_grad",
    "ppo_loss_and_grad",
    "rloo_advantages",
    "simpo_loss_and_grad",
    "token_rewards",
    "value_loss_and_grad",
    "whiten",
]

Array = np.ndarray[Any, Any]

KL_ESTIMATORS = ("k1", "k2", "k3")
DPO_LOSSES = ("sigmoid", "ipo", "hinge")


def _total(x: Array) -> float:
    return float(np.sum(x, dtype=np.float64))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        expected = ", ".join(known)
        raise ConfigError(
            f"{name}: expected one of {expected}, found {value!r}{nearest(value, known)}"
        )


def _log_sigmoid(x: Array) -> Array:
    """``log(1 / (1 + exp(-x)))`` without overflow."""
    result: Array = np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))
    return result


def _sigmoid(x: Array) -> Array:
    decay = np.exp(-np.abs(x))
    result: Array = np.where(x >= 0, 1, decay) / (1 + decay)
    return result.astype(x.dtype, copy=False)


# -- reward models -------------------------------------------------------------------------------


def bradley_terry_loss_and_grad(
    chosen: Array, rejected: Array, margins: Array | None = None
) -> tuple[float, float, Array, Array]:
    """``-log sigmoid(chosen - rejected - margin)`` (Bradley and Terry 1952; Ouyang et al. 2022).

    Parameters
    ----------
    chosen, rejected : ndarray [B]
        Scores of the two responses of each pair.
    margins : ndarray [B], optional
        By how much the chosen one should lead (Touvron et al. 2023, eq. 2).

    Returns
    -------
    total, count : float
    dchosen, drejected : ndarray [B]
    """
    more = {} if margins is None else {"margins": margins}
    chosen, rejected, *leads = floats(chosen=chosen, rejected=rejected, **more)
    lead = chosen - rejected
    for margin in leads:
        lead = lead - margin.astype(lead.dtype)
    dlead = -_sigmoid(-lead)
    return -_total(_log_sigmoid(lead)), float(lead.size), dlead, -dlead


def centering_loss_and_grad(chosen: Array, rejected: Array) -> tuple[float, float, Array, Array]:
    """``(chosen + rejected)^2``, which keeps scores around 0 (Eisenstein et al. 2023).

    Returns
    -------
    total, count : float
    dchosen, drejected : ndarray [B]
    """
    chosen, rejected = floats(chosen=chosen, rejected=rejected)
    both = chosen + rejected
    return _total(both * both), float(both.size), 2 * both, 2 * both


# -- rewards and advantages ----------------------------------------------------------------------


def kl_estimate(
    logprobs: Array, ref_logprobs: Array, estimator: Literal["k1", "k2", "k3"] = "k1"
) -> Array:
    """Estimate ``KL(policy || reference)`` from sampled tokens (Schulman 2020).

    With ``D = logprobs - ref_logprobs``: k1 is D, k2 is ``D^2 / 2``, k3 is ``exp(-D) - 1 + D``.

    Parameters
    ----------
    logprobs, ref_logprobs : ndarray [N]
        Of the sampled tokens, nats.
    estimator : {"k1", "k2", "k3"}

    Returns
    -------
    ndarray [N]

    Raises
    ------
    ConfigError
        If there is no such estimator.
    """
    _one_of("estimator", estimator, KL_ESTIMATORS)
    logprobs, ref_logprobs = floats(logprobs=logprobs, ref_logprobs=ref_logprobs)
    d: Array = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    k3: Array = np.expm1(-d) + d
    return k3


def kl_loss_and_grad(
    logprobs: Array, ref_logprobs: Array, estimator: Literal["k1", "k2", "k3"] = "k3"
) -> tuple[float, float, Array]:
    """Estimated KL as a term of the loss, with its gradient along the sampled log-probabilities.

    That gradient is the one of the true KL only for k2; k1's is 0 in the mean, k3's is biased
    (it is that of the reverse KL): see GRPO's (Shao et al. 2024, eq. 4) use of it.

    Returns
    -------
    total, count : float
    dlogprobs : ndarray [N]
    """
    logprobs, ref_logprobs = floats(logprobs=logprobs, ref_logprobs=ref_logprobs)
    kl = kl_estimate(logprobs, ref_logprobs, estimator)
    d = logprobs - ref_logprobs
    gradient = {"k1": np.ones_like(d), "k2": d, "k3": -np.expm1(-d)}[estimator]
    return _total(kl), float(kl.size), gradient


def token_rewards(kl: Array, scores: Array, offsets: Array, kl_coefficient: float) -> Array:
    """``-kl_coefficient * KL_t`` for every token, the score added at each response's last one.

    Ziegler et al. (2019), eq. 2.

    Parameters
    ----------
    kl : ndarray [N]
        Of each response token.
    scores : ndarray [B]
    offsets : ndarray int [B + 1]
        Where each response begins; none may be empty.
    kl_coefficient : float

    Returns
    -------
    ndarray [N]
    """
    (kl,), (scores,) = floats(kl=kl), floats(scores=scores)
    offsets = segments(offsets, kl.size)
    if (np.diff(offsets) < 1).any():
        raise InputError(f"offsets: response {int(np.argmin(np.diff(offsets)))} is empty")
    if scores.shape != (offsets.size - 1,):
        raise InputError(f"scores: expected {offsets.size - 1}, found shape {scores.shape}")
    rewards: Array = kl * kl.dtype.type(-kl_coefficient)
    rewards[offsets[1:] - 1] += scores.astype(kl.dtype)
    return rewards


def adapted_kl_coefficient(
    kl_coefficient: float, kl: float, steps: int, target: float = 6.0, horizon: float = 10_000.0
) -> float:
    """``beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)`` (Ziegler et al. 2019, sec. 2.2).

    Parameters
    ----------
    kl_coefficient : float
        In force.
    kl : float
        Mean KL of a whole response, nats.
    steps : int
        Responses since the last change.
    target, horizon : float

    Raises
    ------
    ConfigError
        If the horizon is so short that the coefficient could fall below 0.
    """
    if steps >= 5 * horizon:
        raise ConfigError(
            f"training.adaptive_kl_horizon: expected more than a fifth of the {steps} responses of "
            f"a step, found {horizon:g}: the coefficient could fall below 0"
        )
    error = float(np.clip(kl / target - 1, -0.2, 0.2))
    return kl_coefficient * (1 + error * steps / horizon)


def gae(
    rewards: Array, values: Array, offsets: Array, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), value 0 after the end.

    Parameters
    ----------
    rewards, values : ndarray [N]
        Of each response token.
    offsets : ndarray int [B + 1]
        Where each response begins.
    gamma, lam : float

    Returns
    -------
    advantages, returns : ndarray [N]
    """
    rewards, values = floats(rewards=rewards, values=values)
    if rewards.ndim != 1:
        raise InputError(f"rewards: expected one dimension, found shape {rewards.shape}")
    return get_backend().gae(rewards, values, segments(offsets, rewards.size), gamma, lam)


def whiten(x: Array, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8) -> Array:
    """Divide by the standard deviation, over all that is given: the tokens that count.

    Parameters
    ----------
    x : ndarray [N]
    shift_mean : bool
        Whether the mean is removed, as for advantages; rewards keep theirs.
    unbiased : bool
        Whether the variance is divided by ``N - 1``; of a single value it is 0 either way.
    eps : float
        Added to the variance.
    """
    (x,) = floats(x=x)
    if not x.size:
        raise InputError("x: expected at least one value")
    mean = np.mean(x, dtype=np.float64)
    freedom = max(x.size - 1, 1) if unbiased else x.size
    variance = np.sum((x - mean) ** 2, dtype=np.float64) / freedom
    white = (x - mean) / np.sqrt(variance + eps)
    return (white if shift_mean else white + mean).astype(x.dtype)


def grpo_advantages(
    rewards: Array,
    group_size: int,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
) -> Array:
    """Rewards relative to those of the other responses to one prompt (Shao et al. 2024, 4.1.2).

    Parameters
    ----------
    rewards : ndarray [B]
        Group after group.
    group_size : int
        Responses of one prompt.
    scale : {"group", "batch", "none"}
        By what the difference to the group's mean is divided: the group's standard deviation, that
        of all rewards, or nothing (Dr. GRPO, Liu et al. 2025).
    eps : float
        Added to the standard deviation.

    Returns
    -------
    ndarray [B]

    Raises
    ------
    ConfigError
        If there is no such scale.
    InputError
        If the rewards are not whole groups of at least two.
    """
    _one_of("scale", scale, ("group", "batch", "none"))
    (rewards,) = floats(rewards=rewards)
    groups = _groups(rewards, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    if scale == "group":
        centred = centred / (groups.std(axis=1, ddof=1, keepdims=True) + eps)
    elif scale == "batch" and groups.size:
        centred = centred / (groups.std(ddof=1) + eps)
    return centred.reshape(-1).astype(rewards.dtype)


def rloo_advantages(rewards: Array, group_size: int) -> Array:
    """Reward less the mean of the *other* rewards of the group (Ahmadian et al. 2024, eq. 8).

    Parameters and errors as :func:`grpo_advantages`.
    """
    (rewards,) = floats(rewards=rewards)
    groups = _groups(rewards, group_size)
    others = (groups.sum(axis=1, keepdims=True) - groups) / (group_size - 1)
    return (groups - others).reshape(-1).astype(rewards.dtype)


def _groups(rewards: Array, group_size: int) -> Array:
    if group_size < 2:
        raise InputError(f"group_size: expected at least 2, found {group_size}")
    if rewards.ndim != 1 or rewards.size % group_size:
        raise InputError(
            f"rewards: expected whole groups of {group_size}, found shape {rewards.shape}"
        )
    return rewards.astype(np.float64).reshape(-1, group_size)


# -- PPO -----------------------------------------------------------------------------------------


def ppo_loss_and_grad(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    clip_epsilon: float = 0.2,
    clip_epsilon_high: float | None = None,
) -> tuple[float, float, Array]:
    """``max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps))`` (Schulman et al. 2017, eq. 7).

    Parameters
    ----------
    logprobs, old_logprobs : ndarray [N]
        Of the sampled tokens, now and when they were sampled.
    advantages : ndarray [N]
    clip_epsilon : float
    clip_epsilon_high : float, optional
        Of the upper bound, where it differs ("clip-higher", Yu et al. 2025).

    Returns
    -------
    total, count : float
    dlogprobs : ndarray [N]
    """
    logprobs, old_logprobs, advantages = floats(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    kind = logprobs.dtype.type
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    require_at_least("clip_epsilon", clip_epsilon, 0)
    require_at_least("clip_epsilon_high", high, 0)
    ratio = np.exp(logprobs - old_logprobs)
    clipped = np.clip(ratio, kind(1 - clip_epsilon), kind(1 + high))
    free, held = -advantages * ratio, -advantages * clipped
    # Where both are equal nothing is clipped, and the gradient is that of the ratio.
    gradient = np.where(free >= held, free, kind(0))
    return _total(np.maximum(free, held)), float(ratio.size), gradient


def value_loss_and_grad(
    values: Array, old_values: Array, returns: Array, clip_epsilon: float | None = 0.2
) -> tuple[float, float, Array]:
    """``0.5 max((V - R)^2, (V_clipped - R)^2)``, V clipped around its old value.

    Parameters
    ----------
    values, old_values, returns : ndarray [N]
    clip_epsilon : float or None
        None does not clip.

    Returns
    -------
    total, count : float
    dvalues : ndarray [N]
    """
    values, old_values, returns = floats(values=values, old_values=old_values, returns=returns)
    error = values - returns
    if clip_epsilon is None:
        return _total(error * error) / 2, float(values.size), error
    require_at_least("clip_epsilon", clip_epsilon, 0)
    kind = values.dtype.type
    near = np.clip(values, old_values - kind(clip_epsilon), old_values + kind(clip_epsilon))
    held = near - returns
    free_counts = error * error >= held * held
    worst = np.where(free_counts, error, held)
    # Where the clipped one counts and V lies outside the band, V moves nothing.
    gradient = np.where(free_counts, error, np.where(near == values, held, kind(0)))
    return _total(worst * worst) / 2, float(values.size), gradient


# -- preferences without a reward model ----------------------------------------------------------


def dpo_loss_and_grad(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    beta: float = 0.1,
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[float, float, Array, Array]:
    """Direct preference optimisation on the log-probabilities of whole responses.

    With ``h = (chosen - ref_chosen) - (rejected - ref_rejected)``: "sigmoid" is ``-log
    sigmoid(beta h)`` (Rafailov et al. 2023, eq. 7), with `label_smoothing` e ``-(1 - e) log
    sigmoid(beta h) - e log sigmoid(-beta h)`` (Mitchell 2023, conservative); "ipo" is ``(h - 1 / (2
    beta))^2`` (Azar et al. 2024, eq. 17); "hinge" is ``max(0, 1 - beta h)`` (Zhao et al. 2023).

    Parameters
    ----------
    chosen, rejected, ref_chosen, ref_rejected : ndarray [B]
        Summed over the tokens of each response, by the policy and by the reference.
    beta : float
    loss_type : {"sigmoid", "ipo", "hinge"}
    label_smoothing : float
        Share of pairs that are believed to be the wrong way round; of "sigmoid" only.

    Returns
    -------
    total, count : float
    dchosen, drejected : ndarray [B]

    Raises
    ------
    ConfigError
        If there is no such loss, it has no label smoothing, or that is no share.
    """
    _one_of("loss_type", loss_type, DPO_LOSSES)
    if label_smoothing and loss_type != "sigmoid":
        raise ConfigError(f"label_smoothing: the loss '{loss_type}' has none")
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(
            f"label_smoothing: expected a number from 0 to 1, found {label_smoothing}"
        )
    chosen, rejected, ref_chosen, ref_rejected = floats(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    b, e = h.dtype.type(beta), h.dtype.type(label_smoothing)
    if loss_type == "sigmoid":
        losses = -(1 - e) * _log_sigmoid(b * h) - e * _log_sigmoid(-b * h)
        dh = b * (e * _sigmoid(b * h) - (1 - e) * _sigmoid(-b * h))
    elif loss_type == "ipo":
        losses, dh = (h - 1 / (2 * b)) ** 2, 2 * (h - 1 / (2 * b))
    else:
        losses, dh = np.maximum(0, 1 - b * h), np.where(b * h < 1, -b, 0).astype(h.dtype)
    return _total(losses), float(h.size), dh, -dh


def simpo_loss_and_grad(
    chosen: Array,
    rejected: Array,
    chosen_lengths: Array,
    rejected_lengths: Array,
    beta: float = 2.0,
    margin: float = 1.0,
) -> tuple[float, float, Array, Array]:
    """``-log sigmoid(beta (chosen / length - rejected / length) - margin)``, no reference.

    Meng et al. (2024), eq. 6.

    Parameters
    ----------
    chosen, rejected : ndarray [B]
        Log-probabilities summed over the tokens of each response.
    chosen_lengths, rejected_lengths : ndarray [B]
        Tokens.
    beta, margin : float

    Returns
    -------
    total, count : float
    dchosen, drejected : ndarray [B]
    """
    chosen, rejected, chosen_lengths, rejected_lengths = _sums_and_lengths(
        chosen, rejected, chosen_lengths, rejected_lengths
    )
    b = chosen.dtype.type(beta)
    each_chosen = b / chosen_lengths.astype(chosen.dtype)
    each_rejected = b / rejected_lengths.astype(chosen.dtype)
    lead = each_chosen * chosen - each_rejected * rejected - chosen.dtype.type(margin)
    dlead = -_sigmoid(-lead)
    total = -_total(_log_sigmoid(lead))
    return total, float(lead.size), dlead * each_chosen, -dlead * each_rejected


def _sums_and_lengths(
    chosen: Array, rejected: Array, chosen_lengths: Array, rejected_lengths: Array
) -> list[Array]:
    """Return log-probabilities and lengths of both sides, checked."""
    require_at_least("chosen_lengths", chosen_lengths, 1)
    require_at_least("rejected_lengths", rejected_lengths, 1)
    return floats(
        chosen=chosen, rejected=rejected,
        chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
    )  # fmt: skip


def orpo_loss_and_grad(
    chosen: Array, rejected: Array, chosen_lengths: Array, rejected_lengths: Array
) -> tuple[float, float, Array, Array]:
    """``-log sigmoid`` of the log odds ratio of two responses (Hong et al. 2024, eq. 7).

    The odds of a response are ``p / (1 - p)`` with p the geometric mean of its tokens'
    probabilities. The method adds the cross-entropy of the chosen response.

    Parameters
    ----------
    chosen, rejected : ndarray [B]
        Log-probabilities summed over the tokens of each response, below 0.
    chosen_lengths, rejected_lengths : ndarray [B]
        Tokens.

    Returns
    -------
    total, count : float
    dchosen, drejected : ndarray [B]
    """
    chosen, rejected, chosen_lengths, rejected_lengths = _sums_and_lengths(
        chosen, rejected, chosen_lengths, rejected_lengths
    )
    sizes = [n.astype(chosen.dtype) for n in (chosen_lengths, rejected_lengths)]
    means = [chosen / sizes[0], rejected / sizes[1]]
    # 1 - p, and at least what the type can tell from 0: a certain token has p = 1.
    rests = [np.maximum(-np.expm1(mean), np.finfo(mean.dtype).eps) for mean in means]
    lead = (means[0] - np.log(rests[0])) - (means[1] - np.log(rests[1]))
    dlead = -_sigmoid(-lead)
    # d/dm (m - log(1 - exp(m))) = 1 / (1 - exp(m))
    dchosen, drejected = dlead / (rests[0] * sizes[0]), -dlead / (rests[1] * sizes[1])
    return -_total(_log_sigmoid(lead)), float(lead.size), dchosen, drejected


def kto_loss_and_grad(
    logprobs: Array,
    ref_logprobs: Array,
    desirable: Array,
    reference_point: float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[float, float, Array]:
    """Responses that are each good or bad by themselves (Ethayarajh et al. 2024, eq. 8).

    With ``r = logprobs - ref_logprobs``: ``w (1 - sigmoid(beta (r - z)))`` for a desirable one,
    ``w (1 - sigmoid(beta (z - r)))`` for another.

    Parameters
    ----------
    logprobs, ref_logprobs : ndarray [B]
        Summed over the tokens of each response.
    desirable : ndarray bool [B]
    reference_point : float
        z: the estimated KL of policy and reference, at least 0; no gradient flows through it.
    beta, desirable_weight, undesirable_weight : float

    Returns
    -------
    total, count : float
    dlogprobs : ndarray [B]

    Raises
    ------
    InputError
        If `desirable` holds anything but true and false, or shapes differ.
    """
    logprobs, ref_logprobs, desirable = floats(
        logprobs=logprobs, ref_logprobs=ref_logprobs, desirable=desirable
    )
    kind = logprobs.dtype.type
    if not np.isin(desirable, (0, 1)).all():
        raise InputError("desirable: expected true or false (1 or 0)")
    sign = np.where(desirable, kind(1), kind(-1))
    weight = np.where(desirable, kind(desirable_weight), kind(undesirable_weight))
    value = _sigmoid(kind(beta) * sign * (logprobs - ref_logprobs - kind(reference_point)))
    gradient = -weight * kind(beta) * sign * value * (1 - value)
    return _total(weight * (1 - value)), float(value.size), gradient
