"""Write what TRL's PPOTrainer computes from recorded responses: tests/fixtures/trl_ppo.json.

    python tools/make_trl_fixture.py

Its own loop runs, two steps of two passes each in float64; only what it would sample is replaced
by responses that are recorded here. A test holds the preset "trl" to the figures and the weights.
Needs trl 1.9.2, the last that has a PPO trainer, and transformers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from loopos.models.reward import RewardModel
from loopos.models.transformer import Transformer, TransformerConfig

FIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "trl_ppo.json"
VERSION = "1.9.2"
#: Longest response, the token that ends one, and the one that pads: it is in no response.
WIDTH, STOP, PAD = 5, 0, 9
VOCABULARY, RATE, PASSES, TEMPERATURE = 10, 1e-3, 2, 0.7
PROMPTS = [[1, 2, 3], [4, 5, 6], [7, 1, 2], [3, 3, 5], [8, 1, 1], [2, 6, 4], [5, 5, 8], [6, 2, 7]]
#: Of two steps, one to each prompt.
RESPONSES = [
    [[5, 3, 0], [2, 4, 6, 1, 7], [0], [1, 1, 2, 3, 0], [8, 8, 8, 8, 2], [4, 0], [7, 6, 5, 0],
     [1, 2, 3, 4, 5]],
    [[3, 0], [2, 2, 2, 2, 0], [6, 1, 8, 3, 4], [6, 5, 4, 0], [1, 0], [5, 5, 5, 5, 5], [0],
     [8, 7, 6, 0]],
]  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "k3, whitened rewards, penalty": {
        "kl_estimator": "k3", "whiten_rewards": True, "missing_eos_penalty": 0.7
    },
}  # fmt: skip


def waves(shape: tuple[int, ...], phase: float) -> np.ndarray:
    """Weights that no generator of random numbers has to give again."""
    count = int(np.prod(shape))
    found = 0.5 * np.sin(phase + 1.3 * np.arange(count)).reshape(shape)
    return found.astype(np.float32).astype(np.float64)


def model(phase: float) -> Transformer:
    """A GPT-2 of little width; the norms' gains are about 1."""
    config = TransformerConfig(
        d_model=8, num_heads=2, num_layers=2, d_ff=16, vocab_size=VOCABULARY, max_seq_len=16
    )
    made = Transformer(config, dtype="float64")
    for index, (name, parameter) in enumerate(sorted(made.parameters().items())):
        gain = name.endswith("weight") and parameter.data.ndim == 1
        parameter.data[:] = waves(parameter.shape, phase + 0.7 * index) + (1.0 if gain else 0.0)
    return made


def networks() -> tuple[Transformer, Transformer, RewardModel, RewardModel]:
    """Return policy, reference, critic and reward model, all different."""
    heads = [RewardModel(model(phase)) for phase in (2.0, 3.0)]
    for head, phase in zip(heads, (2.5, 3.5), strict=True):
        head.weight.data = waves(head.weight.shape, phase)
    return model(0.0), model(0.02), heads[0], heads[1]


def digest(array: np.ndarray) -> list[float]:
    """Return two numbers that hardly any other array has."""
    values = np.asarray(array, np.float64).reshape(-1)
    return [float(values.sum()), float(values @ np.sin(1.0 + np.arange(values.size)))]


def trl_steps(directory: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Run TRL's loop on the networks saved in a directory."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.set_default_dtype(torch.float64)
    load = {"dtype": torch.float64, "attn_implementation": "eager"}
    language = [
        GPT2LMHeadModel.from_pretrained(directory / name, **load)
        for name in ("policy", "reference")
    ]
    valued = [
        GPT2ForSequenceClassification.from_pretrained(directory / name, num_labels=1, **load)
        for name in ("critic", "reward")
    ]
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="8"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=str(PAD), eos_token=str(STOP), unk_token="8"
    )
    steps: list[dict[str, float]] = []
    recorded = iter(RESPONSES)

    class Reader(TrainerCallback):
        """Keeps the figures of each step."""

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            """Keep them."""
            steps.append({name: value for name, value in logs.items() if name in NAMES})

    def generation(policy: Any, queries: Any, *_: Any) -> tuple[Any, Any]:
        answers = dict(zip(map(tuple, PROMPTS), next(recorded), strict=True))
        chosen = [answers[tuple(query)] for query in queries.tolist()]
        padded = [answer + [PAD] * (WIDTH - len(answer)) for answer in chosen]
        tokens = torch.cat([queries, torch.tensor(padded)], 1)
        logits = ppo_trainer.forward(policy, tokens, PAD).logits[:, queries.shape[1] - 1 : -1]
        return tokens, logits / (TEMPERATURE + 1e-7)

    data = Dataset.from_dict({"input_ids": PROMPTS})
    options = PPOConfig(
        output_dir=str(directory / "run"), report_to="none", save_strategy="no",
        eval_strategy="no", num_sample_generations=0, disable_tqdm=True, use_cpu=True, bf16=False,
        gradient_checkpointing=False, dataloader_pin_memory=False, learning_rate=RATE,
        per_device_train_batch_size=len(PROMPTS), gradient_accumulation_steps=1,
        num_ppo_epochs=PASSES, num_mini_batches=1, response_length=WIDTH, stop_token="eos",
        total_episodes=len(PROMPTS) * len(RESPONSES), temperature=TEMPERATURE, **case,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=options, processing_class=tokenizer, model=language[0], ref_model=language[1],
        reward_model=valued[1], value_model=valued[0], train_dataset=data, eval_dataset=data,
        callbacks=[Reader()],
    )  # fmt: skip
    ppo_trainer.batch_generation = generation
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    trained = {"policy": language[0], "critic": valued[0]}
    return {"steps": steps} | {
        who: {name: digest(p.detach().numpy()) for name, p in network.named_parameters()}
        for who, network in trained.items()
    }


#: TRL's figures that are kept.
NAMES = ("objective/kl", "objective/rlhf_reward", "policy/approxkl_avg", "loss/policy_avg",
         "loss/value_avg", "lr")  # fmt: skip


def main() -> None:
    """Write the file."""
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    import trl

    if trl.__version__ != VERSION:
        raise SystemExit(f"expected trl {VERSION}, found {trl.__version__}")
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            parts = zip(("policy", "reference", "critic", "reward"), networks(), strict=True)
            for part, network in parts:
                network.save(Path(directory) / part)
            found[name] = trl_steps(Path(directory), case)
    FIXTURE.write_text(json.dumps({"trl": VERSION, "cases": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
