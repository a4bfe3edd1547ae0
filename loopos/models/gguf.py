"""Models in GGUF files: their metadata and tensor names in the words of a Hugging Face family.

llama.cpp's conversion renames tensors and, for the architecture "llama", stores the rows of the
query and key projections in another order (its rotation pairs neighbours, Hugging Face's pairs
halves); both are undone here. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from loopos.autograd import Array
from loopos.errors import InputError, ModelFormatError, nearest
from loopos.models.config import TransformerConfig
from loopos.models.families import Family, Rule, family_of
from loopos.models.gguf_file import GgufFile
from loopos.models.transformer import Origin, Transformer, parameter_shapes
from loopos.models.weights import read_finite

__all__ = ["load_gguf", "load_gguf_config"]

#: Architectures and the Hugging Face families that they are.
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: Those whose query and key rows were reordered for a rotation of neighbours.
_INTERLEAVED = ("llama",)

#: Names in a Hugging Face file, without the family's prefix, and in a GGUF file.
_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FREQS = "rope_freqs.weight"

#: Keys of an architecture that are read or concern no computation; any other is refused.
_KEYS = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
)
#: Keys that change the computation unless they have the one value given.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "use_parallel_residual": (False,),
}


def load_gguf_config(path: Path) -> TransformerConfig:
    """Read only the configuration of a GGUF file; see :func:`load_gguf`."""
    return _configured(GgufFile(path))[1]


def load_gguf(path: Path, dtype: np.dtype[Any]) -> Transformer:
    """Read a model from a GGUF file of the architectures llama, qwen2 and qwen3.

    Parameters
    ----------
    path : path
        The file; quantised tensors are dequantised.
    dtype : dtype
        Of the parameters, float32 or float64.

    Raises
    ------
    MissingFileError
        If there is no such file.
    ModelFormatError
        If it is damaged, asks for what loopos does not compute, or a tensor is missing,
        unexpected, of another shape or not finite; one sentence with file and key or tensor.
    InputError
        If the `gguf` library is not installed.
    """
    file = GgufFile(path)
    family, config, origin = _configured(file)
    names = {rule.hf_name: _gguf_name(path, rule) for rule in family.rules(config)}
    known = [*names.values(), _ROPE_FREQS]
    for name in file.names:
        if name not in known:
            raise ModelFormatError(
                f"{path}: unexpected tensor '{name}' in a model of architecture "
                f"'{file.metadata['general.architecture']}' with {config.num_layers} layers"
                + nearest(name, known)
            )
    shapes = parameter_shapes(config)
    arrays: dict[str, Array] = {}
    for rule in family.rules(config):
        own, name = rule.names[0], names[rule.hf_name]
        array = read_finite(file, name, shapes[own], dtype)
        if file.metadata["general.architecture"] in _INTERLEAVED:
            array = _halves(array, own, config)
        arrays[own] = array
    model = Transformer(config, dtype=dtype, arrays=arrays)
    model.origin = Origin(origin, family.prefix, str(path))
    return model


def _gguf_name(path: Path, rule: Rule) -> str:
    """Return the name in a GGUF file of the tensor of a rule."""
    body, _, ending = rule.hf_name.rpartition(".")
    layer = re.fullmatch(r"layers\.(\d+)\.(.*)", body)
    plain = layer[2] if layer else body
    if plain not in _NAMES or len(rule.names) != 1 or rule.transposed:
        raise ModelFormatError(f"{path}: loopos does not know where '{rule.hf_name}' is in it")
    return f"{f'blk.{layer[1]}.' if layer else ''}{_NAMES[plain]}.{ending}"


def _halves(array: Array, own: str, config: TransformerConfig) -> Array:
    """Undo the order of query and key rows in which rotated pairs are neighbours."""
    found = re.fullmatch(r"layers\.\d+\.attention\.([qk])\.(weight|bias)", own)
    if not found:
        return array
    heads = config.num_heads if found[1] == "q" else config.kv_heads
    pairs = array.reshape(heads, config.head_size // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


# -- the configuration ---------------------------------------------------------------------------


def _configured(file: GgufFile) -> tuple[Family, TransformerConfig, dict[str, Any]]:
    """Return the family, the configuration, and the ``config.json`` that says the same."""
    architecture = file.require("general.architecture", str)
    if architecture not in _MODEL_TYPES:
        raise ModelFormatError(
            f"{file.path}: key 'general.architecture' is {architecture!r}, expected one of "
            f"{', '.join(_MODEL_TYPES)}{nearest(architecture, _MODEL_TYPES)}"
        )
    parts = file.get("split.count", int, 1)
    if parts > 1:
        raise ModelFormatError(
            f"{file.path}: is one of {parts} parts (key 'split.count'), expected a whole model"
        )
    _refuse_keys(file, architecture)
    _refuse_size(file, architecture)
    values = _values(file, architecture)
    try:
        family = family_of(values["model_type"])
        config = family.config_from_hf(values)
    except InputError as error:
        raise ModelFormatError(f"{file.path}: in Hugging Face's terms, {error}") from error
    origin = {"model_type": values["model_type"], **family.config_to_hf(config)}
    for key in ("bos", "eos", "pad"):
        gguf_key = "padding" if key == "pad" else key
        origin[f"{key}_token_id"] = file.get(f"tokenizer.ggml.{gguf_key}_token_id", int)
    return family, config, origin


def _refuse_keys(file: GgufFile, architecture: str) -> None:
    """Raise ModelFormatError for a key that may change the computation and is not understood."""
    for key, value in file.metadata.items():
        plain = key.removeprefix(f"{architecture}.")
        several = isinstance(value, (list, np.ndarray))
        harmless = plain in _ONLY and not several and value in _ONLY[plain]
        if plain == key or plain in _KEYS or harmless:
            continue
        close = "" if plain in _ONLY else nearest(plain, _KEYS)
        shown = f"an array of {len(value)}" if several else value
        raise ModelFormatError(
            f"{file.path}: key '{key}' is {shown}, which loopos does not compute{close}"
        )


def _head_size(file: GgufFile, architecture: str, default: int) -> int:
    """Return the width of a head, which keys, values and rotations must share."""
    head: int = file.get(f"{architecture}.attention.key_length", int, default)
    for key in ("attention.value_length", "rope.dimension_count"):
        found = file.get(f"{architecture}.{key}", int, head)
        if found != head:
            raise ModelFormatError(
                f"{file.path}: key '{architecture}.{key}' is {found}, which loopos does not "
                f"compute (it computes the size of a head, {head})"
            )
    return head


def _refuse_size(file: GgufFile, architecture: str) -> None:
    """Raise ModelFormatError for more layers than there can be, before they are listed."""
    layers = file.require(f"{architecture}.block_count", int)
    if layers > len(file.names):
        raise ModelFormatError(
            f"{file.path}: key '{architecture}.block_count' is {layers}, "
            f"more than its {len(file.names)} tensors"
        )
    if "token_embd.weight" not in file.names:
        close = nearest("token_embd.weight", file.names)
        raise ModelFormatError(f"{file.path}: tensor 'token_embd.weight' is missing{close}")


def _values(file: GgufFile, architecture: str) -> dict[str, Any]:
    """Return the keys of a Hugging Face configuration."""

    def size(key: str) -> int:
        found: int = file.require(f"{architecture}.{key}", int)
        return found

    width, heads = size("embedding_length"), size("attention.head_count")
    head = _head_size(file, architecture, width // max(heads, 1))
    theta = file.get(f"{architecture}.rope.freq_base", float, 10000.0)
    values = {
        "model_type": _MODEL_TYPES[architecture],
        "hidden_size": width,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{architecture}.attention.head_count_kv", int, heads),
        "hidden_act": "silu",
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": file.require(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        "vocab_size": file.shape("token_embd.weight")[0],
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, architecture, theta, head),
        "tie_word_embeddings": "output.weight" not in file.names,
    }
    if architecture != "qwen2":  # which has no such keys: q, k and v have biases, o has none
        values |= {"head_dim": head, "attention_bias": "blk.0.attn_q.bias" in file.names}
    elif head * heads != width:
        values["head_dim"] = head
    if architecture == "llama":
        values["mlp_bias"] = "blk.0.ffn_up.bias" in file.names
    return values


def _rope_scaling(
    file: GgufFile, architecture: str, theta: float, head: int
) -> dict[str, Any] | None:
    """Return the scaling of the rotary frequencies; whether it is computed the family says."""
    prefix = f"{architecture}.rope"
    factor = file.get(f"{prefix}.scaling.factor", float, 0.0)
    factor = factor or file.get(f"{prefix}.scale_linear", float, 0.0)
    scaled = factor not in (0, 1)
    kind = file.get(f"{prefix}.scaling.type", str, "linear" if scaled else "none")
    original = file.get(f"{prefix}.scaling.original_context_length", int)
    scaling: dict[str, Any] | None = None
    if kind != "none" and (scaled or kind != "linear"):
        scaling = {"rope_type": kind, "factor": float(factor)}
        if original is not None:
            scaling["original_max_position_embeddings"] = original
    factors = _rope_factors(file, head)
    if factors is None:
        return scaling
    if scaling is not None:
        raise ModelFormatError(
            f"{file.path}: tensor '{_ROPE_FREQS}' and key '{prefix}.scaling.type' both scale the "
            "rotary frequencies"
        )
    context = 8192 if original is None else original
    found = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }
    if not np.allclose(factors, _llama3_factors(found, theta, head), rtol=1e-4, atol=0):
        raise ModelFormatError(
            f"{file.path}: tensor '{_ROPE_FREQS}' scales the rotary frequencies in a way that "
            "loopos does not compute"
        )
    return found


def _rope_factors(file: GgufFile, head: int) -> Array | None:
    """Return by what each rotary frequency is divided, None if by nothing."""
    if _ROPE_FREQS not in file.names:
        return None
    factors = read_finite(file, _ROPE_FREQS, (head // 2,), np.dtype(np.float64))
    return None if (factors == 1).all() else factors


def _llama3_factors(scaling: dict[str, Any], theta: float, head: int) -> Array:
    """Return by what Llama 3.1 divides each rotary frequency.

    The file has the divisors but not the four numbers that they came from; Llama 3.1 and 3.2 have
    one choice of them, so that choice is made and compared. Source: transformers,
    ``modeling_rope_utils.py``, "llama3".
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    with np.errstate(all="ignore"):  # of bases and factors that make no sense, which differ
        turns = context / (2 * math.pi * np.float64(theta) ** (np.arange(0, head, 2) / head))
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        inverse: Array = (1 - smooth) / scaling["factor"] + smooth
        return 1 / inverse
