"""Write what docs/ holds of configurations: the JSON Schema, and the tables of configuration.md.

    python tools/make_reference.py

The source is :mod:`loopos.schema`; only the grouping is decided here. A test fails where the pages
are not what this writes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from loopos.methods import METHODS
from loopos.schema import json_schema
from loopos.training.options import TrainingOptions

DOCS = Path(__file__).parents[1] / "docs"
SCHEMA, PAGE = DOCS / "configuration.schema.json", DOCS / "configuration.md"

#: What methods have in common that learn from their own samples.
_SAMPLES = "max_new_tokens temperature stop_ids rollout_batch_size rollout_weights sample_steps"
_REWARDS = (
    "kl_coefficient kl_estimator exact_kl kl_budget missing_eos_penalty missing_eos_mode "
    "reward_normalisation normalisation_samples"
)
_UPDATES = (
    "ppo_epochs minibatches clip_epsilon clip_epsilon_high entropy_coefficient target_kl "
    "tf1_epsilon"
)
#: Keys of the sections, as people look for them.
GROUPS: dict[str, dict[str, str]] = {
    "model": {
        "Sizes": "d_model num_layers num_heads num_kv_heads head_dim d_ff vocab_size max_seq_len "
        "num_classes",
        "Positions and attention": "positions rope_theta rope_scaling causal window qk_norm",
        "Layers": "norm norm_placement norm_eps activation attention_bias attention_output_bias "
        "mlp_bias dropout",
        "Embeddings and heads": "tied lm_head token_types embedding_norm type",
    },
    "computation": {"": "method mode description backend num_threads seed"},
    "training": {
        "Length and batches": "num_epochs max_steps batch_size batch_tokens "
        "gradient_accumulation_steps shuffle length_bucketing prefetch_batches num_workers",
        "Optimisation": "optimizer learning_rate weight_decay betas eps momentum max_grad_norm "
        "layerwise_lr_decay",
        "Schedule of the learning rate": "scheduler warmup_steps min_learning_rate "
        "scheduler_cycles scheduler_power scheduler_step_size scheduler_gamma "
        "scheduler_timescale",
        "Memory and LoRA": "gradient_checkpointing lora",
        "Evaluation and saving": "eval_steps early_stopping_patience save_steps tensorboard",
    },
    "fine_tuning": {"": "train pooling max_length problem class_weights label_smoothing"},
    "chain_of_thought": {
        "Examples": "with_steps prompt_weight steps_weight answer_weight prompt_template "
        "step_template answer_template chat max_length overflow",
        "Evaluation and rounds": "eval_problems eval_samples max_new_tokens temperature top_p "
        "generation_batch_size rounds samples",
    },
    "reward_model": {"": "centering_coefficient max_length overflow dropout normalise"},
    "dpo": {
        "": "loss_type beta label_smoothing simpo_margin desirable_weight undesirable_weight "
        "nll_coefficient reference_free precompute_reference max_length overflow dropout"
    },
    "rlhf": {
        "Phases": "phases preset supervised reward_model",
        "Samples": f"{_SAMPLES} eval_prompts",
        "Rewards": f"{_REWARDS} adaptive_kl_target adaptive_kl_horizon whiten_rewards "
        "score_after_end",
        "Updates": f"{_UPDATES} gamma lam whiten_advantages whiten_unbiased critic "
        "value_coefficient value_clip critic_learning_rate",
    },
    "grpo": {
        "Problems": "prompt_template step_template answer_template chat eval_problems",
        "Samples": f"group_size {_SAMPLES}",
        "Rewards": f"{_REWARDS} kl_in baseline scale dynamic_sampling",
        "Updates": f"{_UPDATES} loss_aggregation",
    },
    "autoregressive": {"": "sequence_length"},
    "sft": {"": "max_length overflow train_on"},
    "data": {
        "": "training_data reasoning_examples preference_data validation_data validation_fraction "
        "text_field label_field pretrained_weights reward_model tokenizer output_dir"
    },
}
#: Objects in a section, each with a table of its own.
NESTED = {"lora": "training.lora", "rope_scaling": "model.rope_scaling"}

_MARKED = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def schema_text() -> str:
    """Return what configuration.schema.json holds."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def page_text(page: str) -> str:
    """Return configuration.md with its tables as they should be."""
    sections = _sections(json_schema())
    return _MARKED.sub(
        lambda found: f"{found[1]}\n{_tables(found[2], sections[found[2]])}\n{found[3]}", page
    )


def _sections(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the keys of each section, those of all methods apart from those of single ones."""
    parts = {n: schema["properties"][n] for n in ("model", "computation", "data")}
    sections = {name: _marked(part) for name, part in parts.items()}
    common = set(TrainingOptions.__dataclass_fields__)
    for _, method in METHODS:
        options = _marked(schema["$defs"][method])
        sections["training"] = {n: o for n, o in options.items() if n in common}
        sections[method] = {n: o for n, o in options.items() if n not in common}
    return sections


def _marked(part: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of an object, those that it needs marked so."""
    needed = part.get("required", [])
    return {
        n: key | ({"needed": True} if n in needed else {}) for n, key in part["properties"].items()
    }


def _tables(name: str, keys: dict[str, Any]) -> str:
    """Return the tables of a section, and those of the objects in it."""
    groups = {title: names.split() for title, names in GROUPS[name].items()}
    grouped = [key for names in groups.values() for key in names]
    if sorted(grouped) != sorted(keys):
        raise SystemExit(f"{name}: not in one group each: {sorted(set(grouped) ^ set(keys))}")
    parts = []
    for title, names in groups.items():
        heading = f"### {title}\n\n" if title else ""
        parts.append(heading + _table({key: keys[key] for key in names}))
        for key in NESTED:
            if key in names:
                inner = next(k for k in keys[key]["anyOf"] if k.get("type") == "object")
                table = _table(_marked(inner))
                parts.append(f"`{NESTED[key]}` is null or an object with these keys:\n\n{table}")
    return "\n".join(parts)


def _table(keys: dict[str, Any]) -> str:
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key, schema in keys.items():
        default = "needed" if "needed" in schema else ""
        if "default" in schema:
            default = f"`{json.dumps(schema['default'])}`"
        cells = (f"`{key}`", _values(schema), default, schema["description"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _values(schema: dict[str, Any]) -> str:
    """Say in words what values a key takes."""
    if "anyOf" in schema:
        return ", ".join(_values(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    words = {"array": "list", "string": "text", "boolean": "true or false", "null": "`null`"}
    if kinds == ["array"]:
        count = f"{schema['minItems']} " if "minItems" in schema else ""
        items = _values(schema["items"])
        return f"list of {count}{items}" + "s" * ("enum" not in schema["items"])
    return ", ".join(words.get(kind, kind) for kind in kinds)


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    PAGE.write_text(page_text(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
