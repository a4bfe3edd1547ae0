"""The options of an RLHF run: its phases, a published recipe, and the reward model's own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

from loopos.methods.policy_options import require, require_choice, require_numbers
from loopos.methods.ppo import PRESETS
from loopos.methods.ppo import Options as PPOOptions
from loopos.methods.reward_model import Options as RewardOptions
from loopos.training.options import TrainingOptions

__all__ = ["Options", "Phase"]

Phase = Literal["reward_model", "ppo"]
_PHASES: tuple[Phase, ...] = ("reward_model", "ppo")


@dataclass(frozen=True, init=False)
class Options(PPOOptions):
    """Options of an RLHF run: those of PPO, and in an object of their own the reward model's.

    Attributes
    ----------
    phases : tuple of {"reward_model", "ppo"}
        What is done: both, or one alone. "ppo" alone needs ``data.reward_model``; "reward_model"
        alone leaves the policy as it is, and its model is the reward model.
    preset : {"openai-2019", "tldr-2024", "trl"} or None
        A published recipe of PPO; options that are given count before its own.
    reward_model : Options or None
        How the reward model is trained: an object with the options of the method "reward_model".
    eval_prompts : int
        How many held-out prompts are answered at each evaluation.
    sample_steps : int or None
        Steps between two tables of samples, which are shown and written to ``samples.jsonl``.
    """

    phases: tuple[Phase, ...] = _PHASES
    preset: Literal["openai-2019", "tldr-2024", "trl"] | None = None
    reward_model: RewardOptions | None = None
    eval_prompts: int = 128
    sample_steps: int | None = 10

    def __init__(self, **given: Any):
        known = {field.name: field.default for field in fields(self)}
        for name in given:
            if name not in known:
                raise TypeError(f"unexpected option '{name}'")
        preset = given.get("preset")
        recipe = PRESETS[preset] if isinstance(preset, str) and preset in PRESETS else {}
        for name, value in (known | recipe | given).items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset is not None:
            require_choice(self, "preset", tuple(PRESETS))
        require_numbers(self, {"eval_prompts": (True, lambda n: n >= 1, "at least 1")})
        chosen = tuple(self.phases)
        allowed = (_PHASES, *((phase,) for phase in _PHASES))
        expected = "['reward_model', 'ppo'], or one of the two"
        require(self, "phases", chosen in allowed, expected)
        object.__setattr__(self, "phases", chosen)
        inner: Any = {} if self.reward_model is None else self.reward_model
        if isinstance(inner, dict):  # as a checkpoint has it
            object.__setattr__(self, "reward_model", RewardOptions(**inner))

    @property
    def of_reward_model(self) -> RewardOptions:
        """Options of the first phase."""
        return cast(RewardOptions, self.reward_model)

    def stages(self) -> dict[str, TrainingOptions]:
        """Return the options of each phase that is done, in their order."""
        every = {"reward_model": self.of_reward_model, "ppo": self}
        return {phase: every[phase] for phase in self.phases}

    def with_stage(self, phase: str, **overrides: Any) -> Options:
        """Return options of which some of one phase are others."""
        if phase == "ppo":
            return replace(self, **overrides)
        return replace(self, reward_model=replace(self.of_reward_model, **overrides))
