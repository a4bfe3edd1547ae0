"""The sizes and options of the one network that loopos knows, checked as soon as they are given."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, fields
from typing import Any, cast

from loopos.errors import ConfigError, nearest
from loopos.models.rope import RopeScaling

NORMS = ("layer_norm", "rms_norm")
NORM_PLACEMENTS = ("pre", "post")
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu", "swiglu")
POSITIONS = ("learned", "rope", "none")

_CHOICES = {
    "norm": NORMS,
    "norm_placement": NORM_PLACEMENTS,
    "activation": ACTIVATIONS,
    "positions": POSITIONS,
}
_SIZES = ("d_model", "num_heads", "num_layers", "d_ff", "vocab_size", "max_seq_len")
#: Far more than any model has: a list of the parameters of more would fill the memory.
_MOST_LAYERS = 10_000
_OPTIONAL_SIZES = ("num_kv_heads", "head_dim", "window")
_FLAGS = (
    "causal",
    "attention_bias",
    "attention_output_bias",
    "qk_norm",
    "mlp_bias",
    "tied",
    "lm_head",
    "embedding_norm",
)


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides the computation of a :class:`loopos.Transformer`.

    The defaults are GPT-2's shape. Options that are None are resolved when the configuration is
    made, so that reading them always gives a value (`window` and `family` apart).

    Parameters
    ----------
    d_model : int
        Width of the residual stream.
    num_heads : int
        Query heads.
    num_layers : int
        Blocks of attention and feed-forward network.
    d_ff : int
        Width of the feed-forward network.
    vocab_size : int
        Rows of the token table.
    num_kv_heads : int, optional
        Key/value heads, a divisor of `num_heads` (grouped-query attention); `num_heads` if None.
    head_dim : int, optional
        Width of one head, independent of `d_model`; ``d_model / num_heads`` if None.
    max_seq_len : int
        Rows of the position table; with other `positions` the length meant for the model.
    norm : {"layer_norm", "rms_norm"}
        Normalisation of the residual stream.
    norm_placement : {"pre", "post"}
        Before each branch with one more at the end (GPT-2, Llama), or after each addition (BERT).
    norm_eps : float
        Added to the variance in a norm.
    activation : {"gelu_tanh", "gelu", "relu", "silu", "swiglu"}
        Activation of the feed-forward network; "swiglu" has a gate of its own.
    positions : {"learned", "rope", "none"}
        How positions enter: a table, rotations of queries and keys, or not at all.
    rope_theta : float
        Base of the rotary frequencies.
    rope_scaling : RopeScaling or mapping of its fields, optional
        Scaling of the rotary frequencies, for `positions` "rope" only.
    causal : bool
        Whether a token sees only itself and those before it.
    window : int, optional
        How many tokens a token sees to its left, itself included (and to its right if not causal).
    dropout : float
        Rate at the embeddings, the attention probabilities and both branches; acts in training
        only, where dropout keys are given.
    attention_bias : bool
        Whether queries, keys and values have biases.
    attention_output_bias : bool, optional
        Whether the output of the attention has a bias; as `attention_bias` if None.
    mlp_bias : bool
        Whether the feed-forward network has biases.
    qk_norm : bool
        Whether every head of the queries and keys is normalised (RMS) before rotary positions.
    tied : bool
        Whether the language-model head is the token table.
    lm_head : bool, optional
        Whether there is a language-model head; `causal` if None.
    token_types : int
        Rows of the token-type table; 0 for none.
    embedding_norm : bool
        Whether embeddings are normalised.
    family : str, optional
        The Hugging Face family whose layout `save` prefers.

    Raises
    ------
    ConfigError
        If a value is out of range or sizes do not fit each other; the message names the key.
    """

    d_model: int
    num_heads: int
    num_layers: int
    d_ff: int
    vocab_size: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_seq_len: int = 512
    norm: str = "layer_norm"
    norm_placement: str = "pre"
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    positions: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    causal: bool = True
    window: int | None = None
    dropout: float = 0.0
    attention_bias: bool = True
    attention_output_bias: bool | None = None
    qk_norm: bool = False
    mlp_bias: bool = True
    tied: bool = True
    lm_head: bool | None = None
    token_types: int = 0
    embedding_norm: bool = False
    family: str | None = None

    def __post_init__(self) -> None:
        for key in _SIZES:
            self._check_integer(key, 1)
        if self.num_layers > _MOST_LAYERS:
            raise ConfigError(f"num_layers is {self.num_layers}, expected {_MOST_LAYERS} at most")
        for key in _OPTIONAL_SIZES:
            if getattr(self, key) is not None:
                self._check_integer(key, 1)
        self._check_integer("token_types", 0)
        self._resolve()
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if value not in choices:
                raise ConfigError(
                    f"{key} is {value!r}, expected one of {', '.join(choices)}"
                    + nearest(str(value), choices)
                )
        for key in _FLAGS:
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{key} is {getattr(self, key)!r}, expected true or false")
        self._check_number("norm_eps", 0.0, 1.0)
        self._check_number("rope_theta", 1.0, sys.float_info.max)
        self._check_number("dropout", 0.0, 1.0)
        self._check_fit()

    def _resolve(self) -> None:
        """Fill in the options that follow from others."""
        if self.num_kv_heads is None:
            self._set("num_kv_heads", self.num_heads)
        if self.head_dim is None:
            if self.d_model % self.num_heads:
                raise ConfigError(
                    f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}; "
                    "change one of them or give head_dim"
                )
            self._set("head_dim", self.d_model // self.num_heads)
        if self.attention_output_bias is None:
            self._set("attention_output_bias", self.attention_bias)
        if self.lm_head is None:
            self._set("lm_head", self.causal)
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            self._set("rope_scaling", RopeScaling.from_dict(self.rope_scaling))

    def _set(self, key: str, value: Any) -> None:
        object.__setattr__(self, key, value)

    def _check_integer(self, key: str, smallest: int) -> None:
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ConfigError(f"{key} is {value!r}, expected a whole number of at least {smallest}")

    def _check_number(self, key: str, low: float, high: float) -> None:
        value = getattr(self, key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value < high:
            raise ConfigError(f"{key} is {value!r}, expected a number in [{low:g}, {high:g})")

    def _check_fit(self) -> None:
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.positions == "rope" and self.head_size % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; positions 'rope' rotates pairs")
        if self.rope_scaling is not None and self.positions != "rope":
            raise ConfigError(f"rope_scaling needs positions 'rope', found {self.positions!r}")

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads`, resolved."""
        return cast(int, self.num_kv_heads)

    @property
    def head_size(self) -> int:
        """`head_dim`, resolved."""
        return cast(int, self.head_dim)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """Make a configuration from keys and values.

        Raises
        ------
        ConfigError
            If a key is unknown (the nearest valid one is named), missing, or its value is wrong.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown key '{key}'{nearest(key, known)}")
        for field in fields(cls):
            if field.default is MISSING and field.name not in values:
                raise ConfigError(f"key '{field.name}' is missing")
        return cls(**values)
