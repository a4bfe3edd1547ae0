"""The command line: ``loopos run``, ``validate``, ``configs``, ``info``, ``predict``, ``demo``.

Exit codes: 0 done; 2 the input is wrong or the output cannot be written; 130 interrupted, with the
state saved; 1 anything else.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.display import (
    open_standard_streams,
    plain,
    say,
    show_place,
    show_predictions,
    show_prepared,
    show_start,
    show_summary,
    silence,
)
from loopos.errors import InputError, LooposError, MissingFileError, OutputError
from loopos.files import atomic_write_text
from loopos.version import __version__

if TYPE_CHECKING:
    from loopos.methods.fine_tuning import FineTuner
    from loopos.training.trackers import RunInfo

app = typer.Typer(
    name="loopos",
    help="Post-training of transformer language models on CPUs.",
    epilog="First steps: 'loopos demo', then 'loopos configs --copy fine_tuning my.json', "
    "'loopos validate my.json' and 'loopos run my.json'. "
    "Exit codes: 0 done, 2 wrong input, 130 interrupted with the state saved, 1 anything else.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_CONFIG = typer.Argument(
    metavar="CONFIG",
    help="A configuration file (.json, .toml, .yaml), or the name of a shipped one.",
)
_SET = typer.Option(
    "--set",
    metavar="SECTION.KEY=VALUE",
    help="Override one key, as in training.learning_rate=1e-4; may be repeated.",
)
_OUTPUT = typer.Option(
    "--output-dir", metavar="DIRECTORY", help="Where the run goes, instead of data.output_dir."
)


def main() -> None:
    """Run the command line and exit with its code."""
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a text is no reason to die
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run_app()
        try:
            sys.stderr.flush()
        except OSError:  # its reader has left, and Python would complain of it at exit
            silence(2)
        sys.exit(code)
    except BrokenPipeError:
        # Whoever read our output has left: say nothing more, not even at exit.
        silence(1)
        silence(2)
        sys.exit(1)


def _run_app() -> int:
    # What overflows shows in losses and gradients, which every step checks; one sentence is enough.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"loopos\.")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.Exit as request:
        code = request.exit_code
    except (InputError, OutputError) as error:
        return _complain(error, 2)
    except LooposError as error:
        return _complain(error, 1)
    except MemoryError as error:
        return _complain(f"there is not enough memory{f' ({error})' if str(error) else ''}", 1)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", 130)
    except BrokenPipeError:
        raise
    except Exception as error:
        return _usage_or_bug(error)
    return code if isinstance(code, int) else 0


def _usage_or_bug(error: Exception) -> int:
    """Show a usage error as click does (exit 2); raise anything else again, as the bug it is."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        if context is not None:
            print(context.get_usage(), file=sys.stderr)
        return _complain(error.format_message(), 2)
    print("This is a bug in loopos; please report it with what follows.", file=sys.stderr)
    raise error


def _complain(message: object, code: int) -> int:
    for line in str(message).splitlines():
        print(f"error: {plain(line)}", file=sys.stderr)
    return code


def _version(asked: bool) -> None:
    if asked:
        say(f"loopos {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# -- run and validate ----------------------------------------------------------------------------


@app.command()
def run(
    config: Annotated[str, _CONFIG],
    overrides: Annotated[list[str] | None, _SET] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")
    ] = False,
    output_dir: Annotated[Path | None, _OUTPUT] = None,
) -> None:
    """Carry out a configuration: check, train, evaluate, save.

    Ctrl-C stops after the step, saves, and says how to go on.
    """
    from loopos.config import load_config
    from loopos.runner import run as run_config
    from loopos.training.loop import Interrupted
    from loopos.training.trackers import Callback, ConsoleProgress

    loaded = load_config(config, _with_output(overrides, output_dir))

    class Announce(Callback):
        def on_start(self, info: RunInfo) -> None:
            show_start(loaded, info)

    with _stop_on_signals() as stop:
        try:
            summary = run_config(
                loaded,
                resume=resume,
                callbacks=[Announce(), ConsoleProgress()],
                stop=stop,
                on_prepared=show_prepared,
            )
        except (Interrupted, KeyboardInterrupt) as interrupt:
            print(str(interrupt) or "interrupted", file=sys.stderr)
            if any((loaded.output_dir / "checkpoints").glob("step-*")):
                again = ["loopos", "run", config]
                again += [part for override in overrides or [] for part in ("--set", override)]
                again += [] if output_dir is None else ["--output-dir", str(output_dir)]
                print(f"continue with: {shlex.join([*again, '--resume'])}", file=sys.stderr)
            raise typer.Exit(130) from interrupt
    show_summary(summary)


@app.command()
def validate(
    config: Annotated[str, _CONFIG],
    overrides: Annotated[list[str] | None, _SET] = None,
    output_dir: Annotated[Path | None, _OUTPUT] = None,
) -> None:
    """Check a configuration, its data and its model.

    Says what a run would do; trains and writes nothing.
    """
    from loopos.config import load_config
    from loopos.runner import computing, plan, prepare

    loaded = load_config(config, _with_output(overrides, output_dir))
    with computing(loaded):
        prepared = prepare(loaded)
        show_prepared(prepared)
        steps = plan(loaded, prepared)
        say("run")
        say(f"  {steps.steps_per_epoch:,} optimizer steps an epoch, {steps.total_steps:,} in all")
        show_place(loaded)
    say(f"{loaded.source}: fine")


def _with_output(overrides: list[str] | None, output_dir: Path | None) -> list[str]:
    given = [] if output_dir is None else [f"data.output_dir={json.dumps(str(output_dir))}"]
    return [*(overrides or []), *given]


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM asks the run to stop after its step; a second one stops it at once."""
    asked: list[int] = []

    training: list[bool] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked or not training:  # nothing is lost before the first step
            raise KeyboardInterrupt
        asked.append(number)
        # Not print: the signal may have come in the middle of another one.
        os.write(2, b"stopping after this step (again to stop now)\n")

    def stop() -> bool:
        training[:] = [True]
        return bool(asked)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- configs and info ----------------------------------------------------------------------------


@app.command()
def configs(
    show: Annotated[str | None, typer.Option(metavar="NAME", help="Print one of them.")] = None,
    copy: Annotated[
        tuple[str, Path] | None,
        typer.Option(metavar="NAME PATH", help="Copy one of them to a file that does not exist."),
    ] = None,
) -> None:
    """List the configurations that come with loopos."""
    from loopos.config import shipped_configs
    from loopos.errors import nearest

    shipped = shipped_configs()

    def path_of(name: str) -> Path:
        if name not in shipped:
            raise MissingFileError(f"no shipped configuration '{name}'{nearest(name, shipped)}")
        return shipped[name]

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


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show backends, instruction sets, threads and versions."""
    import numpy as np

    from loopos.backends import available_backends, get_backend, unavailable_backends, use_backend
    from loopos.backends.threads import available_cpus

    described = {}
    for name in available_backends():
        with use_backend(name) as backend:
            described[name] = backend.describe()
    facts: dict[str, Any] = {
        "loopos": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpus": available_cpus(),
        "backend": get_backend().describe()["name"],
        "backends": described,
        "unavailable": unavailable_backends(),
    }
    if as_json:
        say(json.dumps(facts, indent=2))
        return
    for name in ("loopos", "python", "numpy", "platform", "cpus"):
        say(f"{name:<12} {facts[name]}")
    for name, what in described.items():
        chosen = " (in force)" if name == facts["backend"] else ""
        say(f"backend      {name}{chosen}: {what['isa']}, {what['threads']} threads")
        say(f"             {len(what['native'])} ops native, {len(what['inherited'])} inherited")
        if "products" in what:
            say(f"             matrix products: {what['products']}")
    for name, reason in facts["unavailable"].items():
        say(f"unavailable  {name}: {reason}")


# -- predict and demo ----------------------------------------------------------------------------


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="A run directory, or a saved classifier.")
    ],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXTS", help="Texts to classify.")
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="A file of rows with a text each."),
    ] = None,
    text_field: Annotated[str, typer.Option(metavar="NAME", help="Name of that field.")] = "text",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write JSON lines to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Classify texts with a trained model.

    Texts are given as arguments, in a file, or line by line on standard input.
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
        given = [_as_utf8(text) for text in texts or []] or _standard_input()
    if not given:
        raise InputError("there is no text to classify")
    rows = list(tuner.predict(given).rows(given))
    if output is not None:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        atomic_write_text(output, "".join(f"{line}\n" for line in lines))
    if as_json:
        escaped = "utf" not in (sys.stdout.encoding or "").lower()
        for row in rows:
            say(json.dumps(row, ensure_ascii=escaped))
    elif output is not None:
        say(f"{len(rows)} predictions in {output}")
    else:
        show_predictions(rows)


def _load_tuner(directory: Path) -> FineTuner:
    """Load the classifier of a run directory, or one that was saved by itself."""
    from loopos.methods.fine_tuning import FineTuner

    if not directory.is_dir():
        raise MissingFileError(f"{directory}: no such directory")
    inner = directory / "model"
    if not inner.is_dir():
        if (directory / "metrics.jsonl").exists():
            raise InputError(
                f"{directory}: this run has not finished, so there is no model in it; "
                "continue it with 'loopos run CONFIG --resume'"
            )
        inner = directory
    if (inner / "config.json").exists() and not (inner / "classifier.json").exists():
        raise InputError(
            f"{inner}: is no classifier (classifier.json is missing); "
            "fine-tune it first, as data.pretrained_weights"
        )
    return FineTuner.load(inner)


def _as_utf8(argument: str) -> str:
    """Undo what a locale other than UTF-8 made of an argument, where it was UTF-8."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def _standard_input() -> list[str]:
    """Return the lines of standard input that have text."""
    if sys.stdin.isatty():
        print("reading texts, one a line, up to Ctrl-D", file=sys.stderr)
    raw = sys.stdin.buffer.read()  # UTF-8 like every file, whatever the locale says
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise InputError(f"standard input:{line}: not UTF-8 text (byte 0x{byte:02x})") from error
    return [line.rstrip("\r") for line in lines if line.strip()]


@app.command()
def demo(
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Where the run goes [outputs/demo].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of order, head and dropout.")] = 0,
) -> None:
    """Fine-tune the shipped base model, offline.

    It learns from the shipped film reviews, and is compared with the same network without
    pretraining; about two minutes on two cores.
    """
    from loopos.demo import run_demo

    with _stop_on_signals() as stop:
        raise typer.Exit(run_demo(output_dir, seed=seed, stop=stop))
