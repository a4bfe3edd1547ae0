"""What the command line prints: plain lines that fit a terminal, with texts shown as they are."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from typing import TYPE_CHECKING, Any

from loopos.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

    from loopos.config import RunConfig
    from loopos.rehearsal import Estimate
    from loopos.runner import Prepared, Summary
    from loopos.training.trackers import RunInfo

__all__ = [
    "open_standard_streams",
    "plain",
    "say",
    "say_json",
    "show_figures",
    "show_place",
    "show_predictions",
    "show_prepared",
    "show_start",
    "show_summary",
    "show_trained",
    "silence",
    "tell",
    "write",
]

#: Control characters would act on the terminal instead of being shown.
_SHOWN = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
#: In JSON, which escapes the others itself.
_ESCAPED = {code: f"\\u{code:04x}" for code in _SHOWN if code > 31}


def plain(text: str) -> str:
    """Return `text` with its control characters spelled out."""
    return text.translate(_SHOWN)


def say(line: str = "") -> None:
    """Print a line at once.

    Raises
    ------
    OutputError
        If standard output takes no more, as on a full disk.
    BrokenPipeError
        If its reader has left.
    """
    write(f"{line}\n")


def say_json(value: Any) -> None:
    """Print a value as one line of JSON; errors as :func:`say`."""
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    say(json.dumps(value, ensure_ascii=ascii_only).translate(_ESCAPED))


def write(text: str) -> None:
    """Print a piece of text at once; errors as :func:`say`."""
    try:
        print(plain(text), end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(1)  # or Python would try, and fail, once more at exit
        raise OutputError(f"standard output: cannot be written ({error.strerror})") from error


def tell(line: str) -> None:
    """Print a line of what goes on to standard error, if anybody is there to read it."""
    try:
        print(plain(line), file=sys.stderr, flush=True)
    except OSError:  # the reader has left: what goes on is worth more than a line
        silence(2)


def silence(number: int) -> None:
    """Let what is still to be written to a descriptor vanish."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def open_standard_streams() -> None:
    """Open those that the caller closed.

    Otherwise the next file opened, perhaps a checkpoint, would be descriptor 2, into which the
    signal handler writes.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest descriptor that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def show_start(config: RunConfig, info: RunInfo, model_parameters: int) -> None:
    """Print how long the run will be, from where, of how many numbers, and what computes."""
    left = f", {info.start_step:,} of them done before" if info.start_step else ""
    say(f"run{_stage(config, info)}\n  {_counted(info.total_steps, 'optimizer step')}{left}")
    show_trained(info.trained_parameters, model_parameters)
    show_place(config)


def show_trained(trained: int, model_parameters: int) -> None:
    """Print how many numbers are trained: with what a method adds maybe more than the model's."""
    added = trained - model_parameters
    note = f": the model's and {added:,} of a head or critic" if added > 0 else ""
    say(f"  {trained:,} parameters are trained{note}")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _stage(config: RunConfig, info: RunInfo) -> str:
    """Return the name of the stage that begins, of a run with several."""
    names = list(config.training.stages()) if hasattr(config.training, "stages") else []
    if len(names) < 2:
        return ""
    inner = info.output_dir.name if info.output_dir is not None else ""
    return f": {inner if inner in names[:-1] else names[-1]}"


def show_place(config: RunConfig) -> None:
    """Print who computes, and where results go."""
    from loopos.backends import get_backend

    described = get_backend().describe()
    threads = described["threads"]
    say(
        f"  backend {described['name']} on {described['isa']} "
        f"({threads} thread{'s' * (threads != 1)}), "
        f"seed {config.computation.seed}"
    )
    say(f"  output in {config.output_dir}")


def show_estimate(estimate: Estimate) -> None:
    """Print what a run will take."""
    gib, free = 2**30, estimate.available_bytes
    has = "" if free is None else f" ({free / gib:.1f} GiB are free)"
    say(f"  memory {estimate.peak_bytes / gib:.2f} GiB at the most{has}")
    parts = [f"{name} {_seconds(spent)}" for name, spent in estimate.stages_s.items()]
    parts.append(f"{_seconds(estimate.step_s)} a step")
    if estimate.evaluation_s:
        parts.append(f"{_seconds(estimate.evaluation_s)} an evaluation")
    parts.append(f"{_seconds(estimate.save_s)} a checkpoint")
    say(f"  time {_seconds(estimate.total_s)} ({', '.join(parts)})")


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def show_prepared(prepared: Prepared) -> None:
    """Print the data report and the size of what is trained."""
    say("data")
    for line in prepared.report.lines():
        say(f"  {line}")
    say(f"model\n  {prepared.num_parameters:,} parameters")


def show_summary(summary: Summary) -> None:
    """Print final figures, the confusion matrix, and what to do next."""
    result, figures = summary.result, summary.evaluation
    best = result.best_checkpoint
    kept = int(best.name.rpartition("-")[2]) if best is not None else result.steps
    note = f"; kept is step {kept}, the best evaluation" if kept != result.steps else ""
    say(f"{_counted(result.steps, 'step')}, {result.stopped_reason.replace('_', ' ')}{note}")
    if figures:
        say("evaluation")
        show_figures(figures, "  ")
        _confusion(figures, summary.output_dir)
    say(f"saved in {summary.output_dir}")
    say(f"next: {_next(summary.output_dir)}")


def _next(directory: Path) -> str:
    """Return what may be done with a finished run, as people type it."""
    from loopos.files import read_json

    run, model = shlex.quote(str(directory)), directory / "model"
    method = read_json(directory / "config.json")["computation"]["method"]
    if (model / "classifier.json").exists():
        return f"loopos predict {run} 'a text'"
    if (model / "reward_model.json").exists():
        return f"loopos evaluate {run} pairs.jsonl"
    if method == "autoregressive":
        return f"fine-tune it with --set {shlex.quote(f'data.pretrained_weights={model}')}"
    if (model / "reasoning.json").exists():
        return f"loopos generate {run} --prompt 'a problem'"
    if _can_chat(model):
        return f"loopos chat {run}"
    return f"loopos generate {run} --prompt 'a prompt'"


def _can_chat(model: Path) -> bool:
    from loopos.files import read_json

    settings = model / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


def show_figures(figures: dict[str, Any], indent: str = "") -> None:
    """Print the figures that are single numbers."""
    for name, value in figures.items():
        if isinstance(value, float):
            say(f"{indent}{name:<20} {value:z.4f}")


def _confusion(figures: dict[str, Any], directory: Path) -> None:
    """Print the confusion matrix, unless it is too wide to read."""
    from rich.cells import cell_len, set_cell_size

    from loopos.files import read_json

    matrix = figures.get("confusion_matrix")
    if matrix is None or len(matrix) > 20:
        return
    names = read_json(directory / "model" / "classifier.json")["labels"]
    # Long names would make lines that no terminal holds.
    names = [set_cell_size(n, 16) if cell_len(n) > 16 else n
             for n in map(str, names or range(len(matrix)))]  # fmt: skip
    width = max(8, *map(cell_len, names), *(len(str(v)) for row in matrix for v in row)) + 1
    say("  true \\ predicted")
    say("  " + " " * width + "".join(" " * (width - cell_len(name)) + name for name in names))
    for name, row in zip(names, matrix, strict=True):
        say("  " + set_cell_size(name, width) + "".join(f"{value:>{width}}" for value in row))


def show_predictions(rows: list[dict[str, Any]]) -> None:
    """Print a line each, empty where nothing was said; on a terminal, cut to its width."""
    from rich.cells import cell_len, set_cell_size

    width = shutil.get_terminal_size((80, 20)).columns if sys.stdout.isatty() else None
    heads = [_said(row) for row in rows]
    longest = max(map(cell_len, heads))
    for row, said in zip(rows, heads, strict=True):
        if not said:
            say()
            continue
        head = set_cell_size(said, longest) + "  "
        if "label" in row:
            head += f"{max(row['probabilities'].values()):6.1%}  "
        text = " ".join(row["text"].split())
        if width is not None:
            room = max(20, width - cell_len(head))
            text = text if cell_len(text) <= room else set_cell_size(text, room - 3) + "..."
        say(head + text)


def _said(row: dict[str, Any]) -> str:
    """Return what a model said of a text: a class, a number, or labels and their probabilities."""
    if all(value is None for name, value in row.items() if name != "text"):
        return ""  # of a line without text
    if "value" in row:
        return f"{row['value']:.4g}"
    if "labels" in row:
        shares = row["probabilities"]
        return ", ".join(f"{name} {shares[name]:.0%}" for name in row["labels"]) or "(none)"
    return str(row["label"])
