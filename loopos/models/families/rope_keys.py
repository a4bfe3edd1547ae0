"""The keys of ``config.json`` that describe rotary positions, of transformers 4 and 5."""

from __future__ import annotations

from typing import Any

from loopos.errors import ConfigError, ModelFormatError
from loopos.models.config import TransformerConfig
from loopos.models.rope import ROPE_KINDS, RopeScaling

#: Where they stand: transformers 5, transformers 4.
_PLACES = ("rope_parameters", "rope_scaling")
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
#: Hugging Face's names of the fields of RopeScaling beside its kind.
_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    _ORIGINAL: "original_max_seq_len",
}
_OF_KIND: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": tuple(_FIELDS),
}

#: Keys that `write_rope` stands for, dropped before it is applied.
REPLACED = ("rope_scaling", _ORIGINAL)


def read_rope(values: dict[str, Any], max_seq_len: int) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling`` of a TransformerConfig.

    Parameters
    ----------
    values : dict
        The whole ``config.json``.
    max_seq_len : int
        The original length of "llama3" where none is given, as transformers 5 has it.

    Raises
    ------
    ModelFormatError
        If loopos does not compute the kind, a key is unknown or missing, or keys disagree.
    """
    theta = values.get("rope_theta")
    found: dict[str, RopeScaling | None] = {}
    for key in _PLACES:
        rope = values.get(key)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, dict):
            raise ModelFormatError(f"key '{key}' is {rope!r}, expected an object")
        original = values.get(_ORIGINAL, rope.get(_ORIGINAL, max_seq_len))
        found[key] = _scaling(key, rope, original)
        own = rope.get("rope_theta")
        if own is not None and theta is not None and own != theta:
            raise ModelFormatError(f"keys 'rope_theta' {theta} and '{key}' {rope!r} disagree")
        theta = theta if own is None else own
    if len(set(found.values())) > 1:
        both = " and ".join(f"'{key}' {values[key]!r}" for key in found)
        raise ModelFormatError(f"keys {both} disagree")
    scaling = next(iter(found.values()), None)
    return {"rope_theta": 10000.0 if theta is None else theta, "rope_scaling": scaling}


def _scaling(key: str, rope: dict[str, Any], original: Any) -> RopeScaling | None:
    """Return the scaling that one object describes."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(_OF_KIND) or rope.get("type", kind) != kind:
        raise ModelFormatError(
            f"key '{key}' has rope_type {rope.get('type', kind)!r}, which loopos does not compute "
            f"(it computes {', '.join(_OF_KIND)})"
        )
    unknown = sorted(set(rope) - _KNOWN - set(_OF_KIND[kind]))
    if unknown or rope.get("partial_rotary_factor", 1) != 1:
        name = unknown[0] if unknown else "partial_rotary_factor"
        raise ModelFormatError(
            f"key '{key}' of rope_type '{kind}' has '{name}' {rope[name]!r}, which loopos does not "
            "compute"
        )
    if kind not in ROPE_KINDS:
        return None
    given = rope | {_ORIGINAL: original}
    missing = [name for name in _OF_KIND[kind] if given.get(name) is None]
    if missing:
        raise ModelFormatError(f"key '{key}' of rope_type '{kind}' has no '{missing[0]}'")
    fields = {_FIELDS[name]: given[name] for name in _OF_KIND[kind]}
    try:
        return RopeScaling(kind, **fields)
    except ConfigError as error:
        raise ModelFormatError(f"key '{key}' is {rope!r}: {error}") from error


def write_rope(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys for transformers 4 (``rope_theta``, ``rope_scaling``) and 5."""
    scaling, theta = config.rope_scaling, config.rope_theta
    if scaling is None:
        plain = {"rope_type": "default", "rope_theta": theta}
        return {"rope_theta": theta, "rope_parameters": plain}
    fields = {name: getattr(scaling, _FIELDS[name]) for name in _OF_KIND[scaling.kind]}
    rope = {"rope_type": scaling.kind, **fields}
    return {
        "rope_theta": theta,
        "rope_scaling": rope,
        "rope_parameters": rope | {"rope_theta": theta},
    }
