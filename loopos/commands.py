"""Commands beside ``run`` and ``validate``: use what was trained, and see what there is."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from loopos.display import say, say_json, show_figures, show_predictions
from loopos.errors import InputError, MissingFileError
from loopos.files import atomic_write_text, read_json, write_json
from loopos.version import __version__

if TYPE_CHECKING:
    from loopos.data.readers import Texts
    from loopos.methods.fine_tuning import FineTuner

_DIRECTORY = typer.Argument(metavar="DIRECTORY", help="A run directory, or a saved classifier.")
_MODEL = typer.Argument(metavar="MODEL", help="A run directory, or a saved model.")
_TEXT = typer.Option("--text-field", metavar="NAME", help="Name of the field of texts.")

#: What optional packages are for.
_EXTRAS = {
    "parquet": "pyarrow", "gguf": "gguf", "hub": "huggingface_hub", "plot": "matplotlib",
    "tensorboard": "tensorboard",
}  # fmt: skip


def configs(
    show: Annotated[str | None, typer.Option(metavar="NAME", help="Print one of them.")] = None,
    copy: Annotated[
        tuple[str, Path] | None,
        typer.Option(metavar="NAME PATH", help="Copy one of them to a file that does not exist."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of configurations, for editors.")
    ] = False,
) -> None:
    """List the configurations that come with loopos.

    Each is run by its name ('loopos run NAME'), or copied and changed.
    """
    from loopos.config import shipped_configs
    from loopos.errors import nearest
    from loopos.schema import json_schema

    shipped = shipped_configs()

    def path_of(name: str) -> Path:
        if name not in shipped:
            raise MissingFileError(f"no shipped configuration '{name}'{nearest(name, shipped)}")
        return shipped[name]

    if sum(asked is not None for asked in (show, copy, schema or None)) > 1:
        raise InputError("give one of --show, --copy and --schema")
    if schema:
        say(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return
    if show is not None:
        say(path_of(show).read_text(encoding="utf-8").rstrip())
        return
    if copy is not None:
        source, target = path_of(copy[0]), copy[1]
        if target.exists():
            raise InputError(f"{target}: exists already")
        atomic_write_text(target, source.read_text(encoding="utf-8"))
        say(f"copied to {target}")
        return
    for name, path in shipped.items():
        description = json.loads(path.read_text(encoding="utf-8"))["computation"]["description"]
        say(f"{name:<16} {description}")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time a training step on every backend.")
    ] = False,
) -> None:
    """Show versions, backends, memory, families and extras."""
    facts = _facts()
    if measure:
        from loopos.measure import measure_backends

        facts["measured"] = vars(measure_backends(facts["backends"], facts["backend"]))
    if as_json:
        say(json.dumps(facts, indent=2))
        return
    for name in ("loopos", "python", "numpy", "platform", "cpus"):
        say(f"{name:<12} {facts[name]}")
    if facts["memory_bytes"] is not None:
        say(f"{'memory':<12} {facts['memory_bytes'] / 2**30:.1f} GiB free")
    for name, what in facts["backends"].items():
        chosen = " (in force)" if name == facts["backend"] else ""
        plural = "" if what["threads"] == 1 else "s"
        say(f"backend      {name}{chosen}: {what['isa']}, {what['threads']} thread{plural}")
        say(f"             {_natives(what)}")
        if "products" in what:
            say(f"             matrix products: {what['products']}")
        if "measured" in facts:
            say(f"             {1000 * facts['measured']['seconds'][name]:.0f} ms a training step")
    if "measured" in facts and facts["measured"]["advice"]:
        say(f"advice       {facts['measured']['advice']}")
    if facts["ignored"]:
        say(f"ignored      {facts['ignored']}")
    for name, reason in facts["unavailable"].items():
        say(f"unavailable  {name}: {reason}")
    say(f"families     {', '.join(facts['families'])}")
    say(f"methods      {', '.join(facts['methods'])}")
    for name, version in facts["extras"].items():
        missing = f"not installed (pip install 'loopos[{name}]')"
        say(f"extra        {name}: {version or missing}")


def _natives(what: dict[str, Any]) -> str:
    """Say which ops a backend computes itself, and which NumPy's code computes for it."""
    native, inherited = what["native"], what["inherited"]
    counted = f"{len(native)} ops native, {len(inherited)} inherited"
    if not inherited or not native:
        return counted
    fewer = min((native, "native"), (inherited, "inherited"), key=lambda pair: len(pair[0]))
    return f"{counted} ({fewer[1]}: {', '.join(fewer[0])})"


def _facts() -> dict[str, Any]:
    import numpy as np

    from loopos.backends import available_backends, get_backend, unavailable_backends, use_backend
    from loopos.backends.memory import available_bytes
    from loopos.backends.threads import available_cpus, ignored_environment
    from loopos.methods import METHODS
    from loopos.models.families import FAMILIES

    described = {}
    for name in available_backends():
        with use_backend(name) as backend:
            described[name] = backend.describe()
    return {
        "loopos": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpus": available_cpus(),
        "ignored": ignored_environment(),
        "memory_bytes": available_bytes(),
        "backend": get_backend().describe()["name"],
        "backends": described,
        "unavailable": unavailable_backends(),
        "families": list(FAMILIES),
        "methods": [f"{mode}/{method}" for mode, method in METHODS],
        "extras": {extra: _version(package) for extra, package in _EXTRAS.items()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- classifiers -----------------------------------------------------------------------------------


def predict(
    model: Annotated[Path, _DIRECTORY],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXTS", help="Texts to classify.")
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="A file of rows with a text each."),
    ] = None,
    text_field: Annotated[str, _TEXT] = "text",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write JSON lines to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Classify texts with a trained model.

    Texts are given as arguments, in a file, or line by line on standard input, which has a line of
    output for each of its lines: an empty one, or null in JSON, where there is no text in it.
    """
    from loopos.data.readers import read_texts

    if texts and input_file is not None:
        raise InputError("give either texts or --input, not both")
    tuner = _load_tuner(model)
    if input_file is not None:
        read = read_texts(input_file, text_field)
        given = read.texts
        if read.dropped:
            places = ", ".join(read.dropped[:5]) + (", ..." if len(read.dropped) > 5 else "")
            print(f"left out, as there is no text: {places}", file=sys.stderr)
    else:
        given = [_as_utf8(text) for text in texts or []] or _standard_lines()
    filled = given if texts or input_file is not None else [t for t in given if t.strip()]
    if not filled:
        raise InputError("there is no text to classify")
    rows = list(tuner.predict(filled).rows(filled))
    if len(filled) < len(given):
        rows = _with_blank(rows, given)
    if output is not None:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        atomic_write_text(output, "".join(f"{line}\n" for line in lines))
    if as_json:
        for row in rows:
            say_json(row)
    elif output is not None:
        say(f"{len(filled)} predictions in {output}")
    else:
        show_predictions(rows)


def _with_blank(rows: list[dict[str, Any]], lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each line: of one without text, the same fields with nothing in them."""
    found, names = iter(rows), [name for name in rows[0] if name != "text"]
    return [next(found) if line.strip() else {"text": line, **dict.fromkeys(names)}
            for line in lines]  # fmt: skip


def _load_tuner(directory: Path) -> FineTuner:
    """Load the classifier of a run directory, or one that was saved by itself."""
    from loopos.methods.fine_tuning import FineTuner
    from loopos.models.weights import is_adapter

    if not directory.is_dir():
        raise MissingFileError(f"{directory}: no such directory")
    inner = directory / "model"
    if not inner.is_dir():
        if (directory / "metrics.jsonl").exists():
            raise _unfinished(directory)
        inner = directory
        known = any((inner / name).exists() for name in ("config.json", "classifier.json"))
        if not known and not is_adapter(inner):
            raise InputError(f"{directory}: is neither a run directory nor a saved classifier")
    network = (inner / "config.json").exists() or is_adapter(inner)
    if network and not (inner / "classifier.json").exists():
        raise InputError(
            f"{inner}: is no classifier (classifier.json is missing); "
            "fine-tune it first, as data.pretrained_weights"
        )
    return FineTuner.load(inner)


def _unfinished(directory: Path) -> InputError:
    return InputError(
        f"{directory}: this run has not finished, so there is no model in it; "
        "continue it with 'loopos run CONFIG --resume'"
    )


def _as_utf8(argument: str) -> str:
    """Undo what a locale other than UTF-8 made of an argument, where it was UTF-8."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def _standard_input() -> list[str]:
    """Return the lines of standard input that have text."""
    return [line for line in _standard_lines() if line.strip()]


def _standard_lines() -> list[str]:
    """Return the lines of standard input."""
    if sys.stdin.isatty():
        print("reading texts, one a line, up to Ctrl-D", file=sys.stderr)
    raw = sys.stdin.buffer.read()  # UTF-8 like every file, whatever the locale says
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise InputError(f"standard input:{line}: not UTF-8 text (byte 0x{byte:02x})") from error
    if not lines[-1]:  # behind the end of the last line
        lines.pop()
    return [line.rstrip("\r") for line in lines]


def evaluate(
    model: Annotated[Path, _MODEL],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Rows as for training; labelled for a classifier.")
    ],
    text_field: Annotated[str, _TEXT] = "text",
    label_field: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the field of labels.")
    ] = "label",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write all figures as JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Measure a model on other data.

    Prints the figures of a classifier, or loss and perplexity of a language model, or the scores of
    a policy by the reward model of its run. A run of pretraining, supervised fine-tuning or chain
    of thought is measured on data as it was trained on, with its own options.
    """
    figures = _evaluated(model, data, text_field, label_field)
    if output is not None:
        write_json(output, figures)
    if as_json:
        say(json.dumps(figures, indent=2))
    else:
        show_figures(figures)


def _evaluated(model: Path, data: str, text_field: str, label_field: str) -> dict[str, Any]:
    from loopos.data.readers import read_labelled, read_texts

    if _is_policy_run(model):
        return _evaluated_policy(model, data)
    if _method_of(model) in ("sft", "chain_of_thought") and not (model / "model").is_dir():
        raise _unfinished(model)
    if (_inner(model) / "reasoning.json").is_file():
        return _evaluated_solver(model, data)
    if _method_of(model) == "sft":
        return _evaluated_conversations(model, data)
    if (_inner(model) / "reward_model.json").is_file():
        from loopos.methods.reward_model import RewardTrainer

        return RewardTrainer.load(_inner(model)).evaluate(data)
    if _is_language_model(model):
        return _evaluated_texts(model, read_texts(data, text_field))
    tuner = _load_tuner(model)
    head = tuner.classifier
    labelled = read_labelled(
        data,
        text_field,
        label_field,
        tuner.label_names,
        None if head.problem == "classification" else head.num_classes,
        head.problem,
    )
    return tuner.evaluate(labelled)


def _evaluated_texts(directory: Path, texts: Texts) -> dict[str, Any]:
    """Let a language model predict texts, cut into pieces as its run did if it is one."""
    from loopos.config import load_config
    from loopos.data.tokenizer import load_tokenizer
    from loopos.methods.pretraining import Options, Pretrainer
    from loopos.models.weights import load_model

    inner, options = _inner(directory), Options()
    if _run_values(directory):
        given = load_config(directory / "config.json").training
        options = given if isinstance(given, Options) else options
    trainer = Pretrainer(load_model(inner), load_tokenizer(inner))
    return dict(trainer.evaluate(texts, options))


def _evaluated_solver(directory: Path, data: str) -> dict[str, Any]:
    """Let a model that learnt to reason solve all problems, as its run did if it is one."""
    from dataclasses import replace

    from loopos.config import load_config
    from loopos.data.reasoning import read_reasoning
    from loopos.methods.chain_of_thought import ChainOfThought, Options

    examples, options, seed = read_reasoning(data, need_steps=False), Options(), 0
    method = _method_of(directory)
    if method in ("chain_of_thought", "grpo"):
        config = load_config(directory / "config.json")
        seed, given = config.computation.seed, config.training
        if isinstance(given, Options):
            options = given
        else:  # what it was rewarded for ended within this length
            options = Options(max_new_tokens=cast(Any, given).max_new_tokens)
    solver = ChainOfThought(_inner(directory), seed=seed)
    return solver.evaluate(examples, replace(options, eval_problems=len(examples)))


def _evaluated_conversations(directory: Path, data: str) -> dict[str, Any]:
    """Measure a run of supervised fine-tuning on rows of the kind that it was trained on."""
    from loopos.config import load_config
    from loopos.data.tokenizer import load_tokenizer
    from loopos.methods.sft import Options, SupervisedFineTuner
    from loopos.models.weights import load_model

    inner, config = _inner(directory), load_config(directory / "config.json")
    trainer = SupervisedFineTuner(load_model(inner), load_tokenizer(inner))
    return dict(trainer.evaluate(data, cast(Options, config.training)))


def _method_of(directory: Path) -> str | None:
    """Return the method of a run, None where a directory holds no run."""
    computation = _run_values(directory).get("computation", {})
    return computation.get("method") if isinstance(computation, dict) else None


def _run_values(directory: Path) -> dict[str, Any]:
    """Return the configuration that a run has kept; that of a model alone has other keys."""
    kept = directory / "config.json"
    return read_json(kept) if (directory / "tokenizer").is_dir() and kept.is_file() else {}


def _is_policy_run(directory: Path) -> bool:
    """Whether it holds a run that trained a policy against a reward model."""
    trained = _run_values(directory).get("training", {}).get("phases", [])
    return _method_of(directory) == "rlhf" and "ppo" in trained


def _evaluated_policy(directory: Path, data: str) -> dict[str, Any]:
    """Let the policy of a run answer the prompts of preferences, and its reward model judge."""
    from dataclasses import replace

    from loopos.config import load_config
    from loopos.data.preferences import read_preferences
    from loopos.data.tokenizer import load_tokenizer
    from loopos.methods import rlhf
    from loopos.models.weights import load_model

    inner = directory / "model"
    if not inner.is_dir():
        raise _unfinished(directory)
    config, pairs = load_config(directory / "config.json"), read_preferences(data)
    given = config.data.reward_model is not None
    judge = config.model_source("reward_model") if given else directory / "reward_model" / "model"
    trainer = rlhf.make(
        load_model(inner), load_tokenizer(inner), pairs, seed=config.computation.seed,
        reward_model=str(judge),
    )  # fmt: skip
    options = cast(rlhf.Options, config.training)
    return trainer.evaluate(pairs, replace(options, eval_prompts=len(pairs.texts)))


def _inner(directory: Path) -> Path:
    return directory / "model" if (directory / "model").is_dir() else directory


def _is_language_model(directory: Path) -> bool:
    from loopos.models.weights import is_adapter, load_config

    inner = _inner(directory)
    if not inner.exists() or (inner / "classifier.json").exists():
        return False
    if inner.is_dir() and not (inner / "config.json").exists() and not is_adapter(inner):
        return False
    return bool(load_config(inner).lm_head)


def merge(
    model: Annotated[Path, _MODEL],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Directory to save in, not there yet.")
    ],
) -> None:
    """Save a model trained with LoRA as a whole one.

    Its adapters are put into copies of the weights, so that it needs no base any more.
    """
    from loopos.data.tokenizer import load_tokenizer
    from loopos.models.heads import load_classifier
    from loopos.models.lora import merge_lora
    from loopos.models.weights import load_model

    inner = _inner(model)
    if not inner.is_dir():
        raise MissingFileError(f"{model}: no such directory")
    if output.exists():
        raise InputError(f"{output}: exists already")
    if (inner / "classifier.json").exists():
        classifier = load_classifier(inner)
        merge_lora(classifier.body)
        classifier.save(output, load_tokenizer(inner))
    else:
        body = load_model(inner)
        merge_lora(body)
        body.save(output, load_tokenizer(inner))
        if (inner / "reasoning.json").is_file():  # it is asked problems still
            write_json(output / "reasoning.json", read_json(inner / "reasoning.json"))
    say(f"saved in {output}")


# -- tokenizers ------------------------------------------------------------------------------------

tokenizer = typer.Typer(help="Train a tokenizer, or see what one makes of a text.")


@tokenizer.command()
def train(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="Files of texts: .txt, or rows with a field."),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIRECTORY", help="Where it is saved.")
    ],
    vocab_size: Annotated[
        int, typer.Option(metavar="N", help="Tokens, the 256 bytes among them.")
    ] = 16000,
    text_field: Annotated[str, _TEXT] = "text",
) -> None:
    """Train a byte-level BPE tokenizer.

    Name its directory as data.tokenizer of a configuration.
    """
    from loopos.data.readers import read_texts
    from loopos.data.tokenizer import train_bpe

    if (output / "tokenizer.json").exists():
        raise InputError(f"{output}: already holds a tokenizer")
    texts = read_texts(data if len(data) > 1 else data[0], text_field)
    trained = train_bpe(texts.texts, vocab_size)
    trained.save(output)
    length = sum(len(text.encode()) for text in texts.texts)
    tokens = sum(len(ids) for ids in trained.encode_batch(list(texts.texts)[:1000]))
    sampled = sum(len(text.encode()) for text in list(texts.texts)[:1000])
    say(f"{trained.vocab_size:,} tokens from {len(texts.texts):,} texts, {length:,} bytes")
    say(f"{sampled / max(1, tokens):.2f} bytes a token")
    say(f"saved in {output}")


@tokenizer.command()
def show(
    path: Annotated[str, typer.Argument(metavar="TOKENIZER", help="Its directory or file.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text.")],
) -> None:
    """Show the tokens of a text, and their ids."""
    from loopos.data.tokenizer import load_tokenizer

    found = load_tokenizer(path)
    ids = found.encode(_as_utf8(text))
    for id_ in ids:
        say(f"{id_:>7}  {found.decode([id_])!r}")
    say(f"{len(ids)} tokens")
