"""The Hugging Face families that loopos reads and writes, one short file each.

To add one: write its file with a ``FAMILY``, add it to `FAMILIES`, and give it a parity fixture.
"""

from __future__ import annotations

from loopos.errors import ModelFormatError, nearest
from loopos.models.config import TransformerConfig
from loopos.models.families import bert, gpt2, llama, mistral, native, qwen2, qwen3
from loopos.models.families.base import Family, Rule

__all__ = ["FAMILIES", "Family", "Rule", "family_for", "family_of"]

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (gpt2, llama, qwen2, qwen3, mistral, bert, native)
}


def family_of(model_type: object) -> Family:
    """Return the family that reads a ``model_type``.

    Raises
    ------
    ModelFormatError
        If none does; the nearest and all known ones are named.
    """
    known = {kind: family for family in FAMILIES.values() for kind in family.model_types}
    if not isinstance(model_type, str) or model_type not in known:
        raise ModelFormatError(
            f"key 'model_type' is {model_type!r}, expected one of {', '.join(known)}"
            + nearest(str(model_type), known)
        )
    return known[model_type]


def family_for(config: TransformerConfig) -> Family:
    """Return the family to save a configuration as: its own if that expresses it, else the first.

    The last of `FAMILIES`, loopos' own format, expresses every configuration.
    """
    preferred = [FAMILIES[config.family]] if config.family in FAMILIES else []
    return next(f for f in [*preferred, *FAMILIES.values()] if f.expresses(config))
