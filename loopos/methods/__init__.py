"""The methods: one file each, found by (mode, method) as configurations name them."""

from __future__ import annotations

#: (computation.mode, computation.method) -> module with an ``Options`` dataclass and a trainer.
METHODS: dict[tuple[str, str], str] = {
    ("posttraining", "fine_tuning"): "loopos.methods.fine_tuning",
    ("pretraining", "autoregressive"): "loopos.methods.pretraining",
}
