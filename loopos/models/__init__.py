"""One transformer, the heads on it, and its files in the layouts of the Hugging Face families."""

from loopos.models.config import TransformerConfig
from loopos.models.heads import SequenceClassifier, load_classifier, pool
from loopos.models.transformer import Transformer
from loopos.models.weights import load_config, load_model, save_model

__all__ = [
    "SequenceClassifier",
    "Transformer",
    "TransformerConfig",
    "load_classifier",
    "load_config",
    "load_model",
    "pool",
    "save_model",
]
