"""loopos: post-training of transformer language models on CPUs, from NumPy.

Names below are imported when first used, so that ``import loopos`` costs next to nothing inside
somebody else's program.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loopos.version import __version__

if TYPE_CHECKING:
    from loopos._ext import get_include as get_include
    from loopos.autograd import Parameter as Parameter
    from loopos.autograd import Tensor as Tensor
    from loopos.autograd import no_grad as no_grad
    from loopos.backends import available_backends as available_backends
    from loopos.backends import get_backend as get_backend
    from loopos.backends import set_backend as set_backend
    from loopos.backends import use_backend as use_backend
    from loopos.backends.threads import get_num_threads as get_num_threads
    from loopos.backends.threads import set_num_threads as set_num_threads
    from loopos.data.batch import Batch as Batch
    from loopos.data.tokenizer import Tokenizer as Tokenizer
    from loopos.data.tokenizer import load_tokenizer as load_tokenizer
    from loopos.errors import LooposError as LooposError
    from loopos.files import builtin as builtin
    from loopos.generation.engine import Generation as Generation
    from loopos.generation.generate import generate as generate
    from loopos.generation.generate import stream as stream
    from loopos.generation.sampling import SamplingOptions as SamplingOptions
    from loopos.methods.chain_of_thought import ChainOfThought as ChainOfThought
    from loopos.methods.dpo import DPOTrainer as DPOTrainer
    from loopos.methods.fine_tuning import FineTuner as FineTuner
    from loopos.methods.grpo import GRPOTrainer as GRPOTrainer
    from loopos.methods.ppo import PPOTrainer as PPOTrainer
    from loopos.methods.pretraining import Pretrainer as Pretrainer
    from loopos.methods.reinforcement import ReinforcementTrainer as ReinforcementTrainer
    from loopos.methods.reward_model import RewardTrainer as RewardTrainer
    from loopos.methods.sft import SupervisedFineTuner as SupervisedFineTuner
    from loopos.models.adapter import LoraConfig as LoraConfig
    from loopos.models.heads import SequenceClassifier as SequenceClassifier
    from loopos.models.lora import add_lora as add_lora
    from loopos.models.lora import merge_lora as merge_lora
    from loopos.models.lora import unmerge_lora as unmerge_lora
    from loopos.models.peft_files import load_adapters as load_adapters
    from loopos.models.reward import RewardModel as RewardModel
    from loopos.models.reward import load_reward_model as load_reward_model
    from loopos.models.transformer import Transformer as Transformer
    from loopos.models.transformer import TransformerConfig as TransformerConfig
    from loopos.models.weights import load_model as load_model
    from loopos.ops import DropoutKeys as DropoutKeys
    from loopos.training.optim import SGD as SGD
    from loopos.training.optim import Adam as Adam
    from loopos.training.optim import AdamW as AdamW

_HOMES = {
    "loopos._ext": ["get_include"],
    "loopos.autograd": ["Parameter", "Tensor", "no_grad"],
    "loopos.backends": ["available_backends", "get_backend", "set_backend", "use_backend"],
    "loopos.backends.threads": ["get_num_threads", "set_num_threads"],
    "loopos.data.batch": ["Batch"],
    "loopos.data.tokenizer": ["Tokenizer", "load_tokenizer"],
    "loopos.errors": ["LooposError"],
    "loopos.files": ["builtin"],
    "loopos.generation.engine": ["Generation"],
    "loopos.generation.generate": ["generate", "stream"],
    "loopos.generation.sampling": ["SamplingOptions"],
    "loopos.methods.chain_of_thought": ["ChainOfThought"],
    "loopos.methods.dpo": ["DPOTrainer"],
    "loopos.methods.fine_tuning": ["FineTuner"],
    "loopos.methods.grpo": ["GRPOTrainer"],
    "loopos.methods.ppo": ["PPOTrainer"],
    "loopos.methods.pretraining": ["Pretrainer"],
    "loopos.methods.reinforcement": ["ReinforcementTrainer"],
    "loopos.methods.sft": ["SupervisedFineTuner"],
    "loopos.methods.reward_model": ["RewardTrainer"],
    "loopos.models.adapter": ["LoraConfig"],
    "loopos.models.heads": ["SequenceClassifier"],
    "loopos.models.lora": ["add_lora", "merge_lora", "unmerge_lora"],
    "loopos.models.peft_files": ["load_adapters"],
    "loopos.models.reward": ["RewardModel", "load_reward_model"],
    "loopos.models.transformer": ["Transformer", "TransformerConfig"],
    "loopos.models.weights": ["load_model"],
    "loopos.ops": ["DropoutKeys"],
    "loopos.training.optim": ["SGD", "Adam", "AdamW"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'loopos' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
