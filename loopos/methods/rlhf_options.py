"""The options of an RLHF run: its phases, a published recipe, and the reward model's own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, cast

from loopos.errors import ConfigError
from loopos.methods.policy_options import require, require_choice, require_numbers
from loopos.methods.ppo import PRESETS
from loopos.methods.ppo import Options as PPOOptions
from loopos.methods.reward_model import Options as RewardOptions
from loopos.training.options import TrainingOptions

__all__ = ["Options", "Phase"]

Phase = Literal["supervised", "reward_model", "ppo"]
_PHASES: tuple[Phase, ...] = ("supervised", "reward_model", "ppo")


@dataclass(frozen=True, init=False)
class Options(PPOOptions):
    """Options of an RLHF run: those of PPO, and in an object of their own the reward model's.

    Attributes
    ----------
    phases : tuple of {"supervised", "reward_model", "ppo"}
        What is done, in this order: without "reward_model", ``data.reward_model`` is needed;
        without "ppo", the model of the run is the reward model. With "supervised" the policy first
        learns the chosen responses, which a model that cannot talk yet needs.
    preset : {"openai-2019", "tldr-2024", "trl"} or None
        A published recipe of PPO; options that are given count before its own.
    supervised : TrainingOptions or None
        How the policy learns the chosen responses: an object with the options of every run.
    reward_model : Options or None
        How the reward model is trained: an object with the options of the method "reward_model".
    eval_prompts : int
        How many held-out prompts are answered at each evaluation.
    sample_steps : int or None
        Steps between two tables of samples, which are shown and written to ``samples.jsonl``.
    """

    phases: tuple[Phase, ...] = ("reward_model", "ppo")
    preset: Literal["openai-2019", "tldr-2024", "trl"] | None = None
    supervised: TrainingOptions | None = None
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
        ordered = tuple(phase for phase in _PHASES if phase in chosen)
        expected = (
            "'supervised', 'reward_model' and 'ppo' in this order, one of the last two at least"
        )
        held = chosen == ordered and bool(set(chosen) - {"supervised"})
        require(self, "phases", held, expected)
        object.__setattr__(self, "phases", chosen)
        for name, kind in (("supervised", TrainingOptions), ("reward_model", RewardOptions)):
            inner = getattr(self, name)
            if inner is None or isinstance(inner, dict):  # as a checkpoint has it
                object.__setattr__(self, name, kind(**inner or {}))
        if self.of_supervised.lora is not None:
            raise ConfigError("training.supervised.lora: this phase trains the whole policy")

    @property
    def of_supervised(self) -> TrainingOptions:
        """Options of the phase that learns the chosen responses."""
        return cast(TrainingOptions, self.supervised)

    @property
    def of_reward_model(self) -> RewardOptions:
        """Options of the phase that trains the reward model."""
        return cast(RewardOptions, self.reward_model)

    def replaced(self, **overrides: Any) -> Self:
        """Return options of which some are others; a recipe counts where nothing else was given."""
        if "preset" not in overrides:
            return replace(self, **overrides)
        plain = {field.name: field.default for field in fields(self)}
        plain |= PRESETS.get(self.preset or "", {})
        given = {name: getattr(self, name) for name in plain if getattr(self, name) != plain[name]}
        return type(self)(**given | overrides)

    def stages(self) -> dict[str, TrainingOptions]:
        """Return the options of each phase that is done, in their order."""
        every = {"supervised": self.of_supervised, "reward_model": self.of_reward_model,
                 "ppo": self}  # fmt: skip
        return {phase: every[phase] for phase in self.phases}

    def with_stage(self, phase: str, **overrides: Any) -> Options:
        """Return options of which some of one phase are others."""
        if phase == "ppo":
            return replace(self, **overrides)
        return replace(self, **{phase: replace(getattr(self, phase), **overrides)})
