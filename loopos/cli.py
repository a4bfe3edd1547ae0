"""The command line: ``loopos run``, ``validate`` and ``demo`` here, the rest in ``commands``.

Exit codes: 0 done; 2 the input is wrong or the output cannot be written; 130 interrupted, with the
state saved; 1 anything else.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from loopos import commands, generate_commands, preview, report_commands
from loopos.display import (
    open_standard_streams,
    plain,
    say,
    show_estimate,
    show_place,
    show_prepared,
    show_start,
    show_summary,
    show_trained,
    silence,
    tell,
)
from loopos.errors import InputError, LooposError, OutputError
from loopos.version import __version__

if TYPE_CHECKING:
    from loopos.runner import Prepared
    from loopos.training.trackers import RunInfo


class _Interrupted(Exception):
    """Ctrl-C, of which click would make an exit code without a word."""


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Carry out a command; say so where it is interrupted."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Interrupted from interrupt


app = typer.Typer(
    name="loopos",
    cls=_Commands,
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
    except (KeyboardInterrupt, _Interrupted, typer.Abort):
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
    output_dir: Annotated[str | None, _OUTPUT] = None,
) -> None:
    """Carry out a configuration: check, train, evaluate, save.

    Ctrl-C stops after the step, saves, and says how to go on.
    """
    from loopos.config import load_config
    from loopos.runner import run as run_config
    from loopos.training.loop import Interrupted
    from loopos.training.trackers import Callback, ConsoleProgress

    loaded = load_config(config, _with_output(overrides, output_dir))

    sizes: list[int] = []

    def announce(prepared: Prepared) -> None:
        sizes.append(prepared.num_parameters)
        show_prepared(prepared)

    class Announce(Callback):
        def on_start(self, info: RunInfo) -> None:
            show_start(loaded, info, sizes[0])

    with _stop_on_signals() as stop:
        try:
            summary = run_config(
                loaded,
                resume=resume,
                callbacks=[Announce(), ConsoleProgress()],
                stop=stop,
                on_prepared=announce,
                tell=tell,
            )
        except (Interrupted, KeyboardInterrupt) as interrupt:
            print(str(interrupt) or "interrupted", file=sys.stderr)
            places = ("checkpoints/step-*", "*/checkpoints/step-*")
            if any(any(loaded.output_dir.glob(place)) for place in places):
                again = ["loopos", "run", config]
                again += [part for override in overrides or [] for part in ("--set", override)]
                again += [] if output_dir is None else ["--output-dir", output_dir]
                print(f"continue with: {shlex.join([*again, '--resume'])}", file=sys.stderr)
            raise typer.Exit(130) from interrupt
    show_summary(summary)


@app.command()
def validate(
    config: Annotated[str, _CONFIG],
    overrides: Annotated[list[str] | None, _SET] = None,
    output_dir: Annotated[str | None, _OUTPUT] = None,
    measure: Annotated[
        bool, typer.Option(help="Try a few steps to tell how much memory and time a run takes.")
    ] = True,
) -> None:
    """Check a configuration, and say what a run would take.

    Data and model are read. A few steps are tried, in a process of its own, and forgotten; exits
    with 2 where a run would not fit into memory.
    """
    from loopos.config import load_config
    from loopos.rehearsal import refuse_memory, rehearse
    from loopos.runner import computing, plan, prepare

    given = _with_output(overrides, output_dir)
    with _stop_on_signals():  # SIGTERM too, so that the rehearsal is ended and cleared away
        loaded = load_config(config, given)
        with computing(loaded):
            prepared = prepare(loaded, tell=tell)
            show_prepared(prepared)
            steps = plan(loaded, prepared)
            say("run")
            for name, one in (steps.stages or {"": steps}).items():
                stage = f"{name}: " if name else ""
                an_epoch = f"{one.steps_per_epoch:,} optimizer steps an epoch"
                say(f"  {stage}{an_epoch}, {one.total_steps:,} in all")
            show_trained(steps.trained_parameters, prepared.num_parameters)
            show_place(loaded)
        del prepared  # the rehearsal wants the memory for itself
        if measure:
            estimate = rehearse(loaded, given)
            show_estimate(estimate)
            if not estimate.fits:
                refuse_memory(loaded, estimate.available_bytes, estimate.peak_bytes)
        say(f"{loaded.source}: fine")


def _with_output(overrides: list[str] | None, output_dir: str | None) -> list[str]:
    if output_dir == "":  # "$UNSET"; as a path it would be the current directory
        raise InputError("--output-dir: expected a directory, found nothing")
    given = [] if output_dir is None else [f"data.output_dir={json.dumps(output_dir)}"]
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


# -- the rest --------------------------------------------------------------------------------------

app.command()(preview.preview)
app.command()(generate_commands.generate)
app.command()(generate_commands.chat)
app.command()(commands.predict)
app.command()(commands.evaluate)
app.command()(commands.merge)
app.command()(report_commands.report)
app.command()(report_commands.doctor)
app.command()(commands.configs)
app.command()(commands.info)
app.add_typer(commands.tokenizer, name="tokenizer")


class _Demo(StrEnum):
    fine_tuning = "fine_tuning"
    chain_of_thought = "chain_of_thought"
    rlhf = "rlhf"


@app.command()
def demo(
    name: Annotated[
        _Demo, typer.Argument(metavar="[NAME]", help="fine_tuning, chain_of_thought or rlhf.")
    ] = _Demo.fine_tuning,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Where the run goes [outputs/demo].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and data.")] = 0,
) -> None:
    """Show what loopos does, offline, in a few minutes on two cores.

    fine_tuning: the shipped base model learns from the shipped film reviews, and is compared with
    the same network without pretraining. chain_of_thought: a fresh model learns to solve word
    problems step by step, and is asked others before and after. rlhf: a reward model learns what
    people prefer, and PPO lets the base model write more of it.
    """
    from loopos.config_files import expanded
    from loopos.demo import run_demo
    from loopos.demo_reasoning import run_reasoning_demo
    from loopos.demo_rlhf import run_rlhf_demo

    chosen = {
        _Demo.fine_tuning: run_demo,
        _Demo.chain_of_thought: run_reasoning_demo,
        _Demo.rlhf: run_rlhf_demo,
    }[name]
    wanted = None if output_dir is None else expanded(output_dir)
    with _stop_on_signals() as stop:
        raise typer.Exit(chosen(wanted, seed=seed, stop=stop))
