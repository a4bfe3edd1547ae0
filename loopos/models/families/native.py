"""loopos' own format, for configurations that no Hugging Face family expresses.

``config.json`` holds the fields of TransformerConfig, and tensors have loopos' parameter names.
transformers does not know it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from loopos.models.config import TransformerConfig
from loopos.models.families.base import Family, Rule
from loopos.models.transformer import parameter_shapes

_NOT_OURS = ("model_type", "architectures", "dtype", "loopos_version")


def config_from_hf(values: dict[str, Any]) -> TransformerConfig:
    """Return the configuration, every key of which must be known."""
    return TransformerConfig.from_dict({k: v for k, v in values.items() if k not in _NOT_OURS})


def rules(config: TransformerConfig) -> list[Rule]:
    """Return one rule a parameter."""
    return [Rule(name, (name,)) for name in parameter_shapes(config)]


FAMILY = Family(
    name="loopos",
    model_types=("loopos",),
    prefix="",
    base_architecture="loopos.Transformer",
    head_architecture="loopos.Transformer",
    config_from_hf=config_from_hf,
    config_to_hf=asdict,
    expresses=lambda config: True,
    rules=rules,
    kept=(r"(pooler|cls|score|classifier|qa_outputs|multiple_choice_head)\..*",),
)
