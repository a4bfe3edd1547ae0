#!/usr/bin/env python3
"""Time the same work on loopos and on PyTorch, and measure what the machine could do at most.

    python benchmarks/peers.py [--works A,C] [--backend cython,numba] [--threads 2] [--rounds 3]
        [--dtypes float32,int8] [--compile] [--buckets] [--no-peer] [--check-losses]
        [--trl-python PATH] [--json FILE]

Each side runs in a process of its own, and they take turns: a machine that others use too is then
slow for both. Every process warms up; figures are medians over rounds of each process' median. The
machine's limits are measured in every round as well. Works: A, B, C, K, L1, L2 (L for both), "gemm"
(products against NumPy's BLAS), "first-step" (python to the first finished step of A) and "import";
targets.json says what they are; F, F-long, G and "prefill" are of generation, against transformers
and, where llama-cpp-python is installed, llama.cpp, with the weights of --dtypes. D and E, PPO
steps, are against TRL 1.9.2 where it is installed, or by another python that has it: --trl-python.
"pretraining", "sft", "reward-model", "dpo" and "grpo" are whole methods, without a peer.
PyTorch's side needs torch and transformers; --no-peer leaves peers out. --json writes a list of
rows, one for each work, backend and peer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from rich.console import Console
from rich.table import Table
from suite import decoding, limits, methods, reinforcement, targets, works
from suite.machine import Machine, NotMeasuredError, measure

import loopos
from loopos.backends.threads import available_cpus
from loopos.files import atomic_write_text

HERE = Path(__file__).parent
ALL_WORKS = (
    *methods.EVERY, *decoding.DECODING, "gemm", "first-step", "import",
)  # fmt: skip
#: Of those of reinforcement learning, what TRL does too.
TRL_WORKS = ("D", "E")
#: What both sides of these say of a run, and what must be the same on both.
STEP_FIGURES, SAME_FIGURES = ("tokens", "rollout_share", "state_mb"), ("tokens", "updates")
COMPILED = ("A", "B", "C")
LOSS_TOLERANCE = 1e-4
#: Colder than this PyTorch looks up to twice as slow as it is.
LEAST_WARMUP = 4
Row = dict[str, Any]
_log = Console(stderr=True)


@dataclass(frozen=True)
class Side:
    """Who does a work.

    Attributes
    ----------
    name : str or None
        Of the backend, or of the peer.
    command : tuple of str
        Before the options that all sides share.
    buckets : bool
        Whether a padding peer sorts by length.
    python : str
        What interprets the command.
    """

    name: str | None
    command: tuple[str, ...]
    buckets: bool = False
    python: str = sys.executable


@dataclass(frozen=True)
class Pair:
    """One work, those of us who do it, and those we are compared with."""

    work: str
    ours: list[Side]
    theirs: list[Side]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--works", default=",".join(ALL_WORKS), help="such as A,C; default all")
    made.add_argument("--backend", default="auto", help="one or more of them, 'auto' or 'all'")
    made.add_argument("--threads", type=int, default=available_cpus())
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--runs", type=int, default=7, help="timed, in each process")
    made.add_argument("--warmup", type=int, default=LEAST_WARMUP)
    every = ",".join(decoding.DTYPES)
    made.add_argument("--dtypes", default=every, help=f"of weights in generation; default {every}")
    made.add_argument("--compile", action="store_true", help="torch.compile too")
    made.add_argument("--buckets", action="store_true", help="K in four batches by length too")
    made.add_argument("--no-peer", action="store_true", help="loopos and the limits only")
    made.add_argument("--trl-python", metavar="PATH", help="a python that has trl")
    made.add_argument("--check-losses", action="store_true", help="same weights, same first loss")
    made.add_argument("--json", type=Path, metavar="FILE")
    return made


def chosen_works(asked: str) -> list[str]:
    """Return the works of a list such as "A,L"."""
    found: list[str] = []
    for name in asked.split(","):
        found += ["L1", "L2"] if name == "L" else [name]
    unknown = [name for name in found if name not in ALL_WORKS]
    if unknown:
        parser().error(f"--works: unknown work '{unknown[0]}' (known: {', '.join(ALL_WORKS)})")
    return found


def chosen_backends(asked: str) -> list[str]:
    """Return the backends of a list such as "cython,numpy", all that run here, or the fastest."""
    able = loopos.available_backends()
    if asked in ("auto", "all"):
        return able if asked == "all" else able[:1]
    for name in asked.split(","):
        if name not in able:
            parser().error(f"--backend: '{name}' cannot run here (can: {', '.join(able)})")
    return asked.split(",")


def plan(asked: argparse.Namespace) -> list[Pair]:
    """Return who does what."""
    backends, pairs = chosen_backends(asked.backend), []
    for work in chosen_works(asked.works):
        if work == "import":
            pairs.append(Pair(work, [Side(None, ("-c", "import loopos"))], []))
            continue
        if work in decoding.DECODING:
            pairs += [generation(work, dtype, backends, asked) for dtype in chosen_dtypes(asked)]
            continue
        # PyTorch does the step alone where we are timed with all that is around it.
        letter = {"first-step": "A", "B-whole": "B"}.get(work, work)
        half = str(HERE / "loopos_half.py")
        mine = "A" if work == "first-step" else work
        ours = [Side(name, (half, mine, "--backend", name)) for name in backends]
        theirs: list[Side] = []
        if work in reinforcement.WORKS:
            pairs.append(Pair(work, ours, trl_sides(work, asked)))
            continue
        if not asked.no_peer and work != "gemm" and work not in methods.WORKS:
            torch = (str(HERE / "torch_half.py"), letter)
            theirs.append(Side("torch-eager", torch))
            if asked.compile and work in COMPILED:
                theirs.append(Side("torch-compile", (*torch, "--compile")))
            if asked.buckets and work == "K":
                theirs.append(Side("torch-eager", (*torch, "--buckets"), buckets=True))
        pairs.append(Pair(work, ours, theirs))
    return pairs


def trl_sides(work: str, asked: argparse.Namespace) -> list[Side]:
    """Return TRL, which is optional."""
    if asked.no_peer or work not in TRL_WORKS:
        return []
    command = (str(HERE / "trl_half.py"), work)
    if asked.trl_python is not None:
        return [Side("trl", command, python=asked.trl_python)]
    if importlib.util.find_spec("trl") is not None:
        return [Side("trl", command)]
    _log.print(f"{work}: no peer, trl is not installed and --trl-python is not given")
    return []


def chosen_dtypes(asked: argparse.Namespace) -> list[str]:
    """Return the dtypes of a list such as "float32,int8"."""
    for name in asked.dtypes.split(","):
        if name not in decoding.DTYPES:
            known = ", ".join(decoding.DTYPES)
            parser().error(f"--dtypes: unknown dtype '{name}' (known: {known})")
    return list(asked.dtypes.split(","))


def generation(work: str, dtype: str, backends: list[str], asked: argparse.Namespace) -> Pair:
    """Return who generates; transformers has float32, llama.cpp is optional."""
    kind, half = ("--dtype", dtype), str(HERE / "loopos_half.py")
    ours = [Side(name, (half, work, "--backend", name, *kind)) for name in backends]
    theirs = []
    if not asked.no_peer and dtype == "float32":
        theirs.append(Side("transformers", (str(HERE / "transformers_half.py"), work)))
    if not asked.no_peer and importlib.util.find_spec("llama_cpp") is not None:
        theirs.append(Side("llama.cpp", (str(HERE / "llama_half.py"), work, *kind)))
    return Pair(work, ours, theirs)


def call(command: tuple[str, ...], threads: int, python: str = sys.executable) -> tuple[Any, float]:
    """Run Python on `command`; return the JSON that it prints, and seconds until it was there."""
    count = str(threads)
    pools = ("OMP", "OPENBLAS", "MKL", "NUMBA")
    environment = os.environ | {f"{pool}_NUM_THREADS": count for pool in pools}
    environment.pop("LOOPOS_BACKEND", None)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, as if installed
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [python, *command], stdout=subprocess.PIPE, stderr=errors, text=True,
            env=environment,
        )  # fmt: skip
        found, spent = None, None
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(("{", "[")):
                    found, spent = json.loads(line), time.perf_counter() - start
        ended = time.perf_counter() - start
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
    return found, ended if spent is None else spent


def take_turn(work: str, side: Side, asked: argparse.Namespace) -> list[Row]:
    """Run one side once; return a record of each work in it, with the time as `s`."""
    if work == "import":
        spent = call(side.command, asked.threads)[1] - call(("-c", "pass"), asked.threads)[1]
        return [{"work": work, "s": max(0.0, spent)}]
    cold = work == "first-step"
    runs, warmup = (1, 0) if cold else (asked.runs, asked.warmup)
    options = ("--threads", asked.threads, "--runs", runs, "--warmup", warmup)
    found, spent = call((*side.command, *map(str, options)), asked.threads, side.python)
    if work == "gemm":
        return [record | {"s": record["loopos_s"]} for record in found]
    taken = found["loopos_s"] if "loopos_s" in found else found["peer_s"]
    return [found | {"work": work, "s": spent if cold else taken}]


def measured(asked: argparse.Namespace) -> Machine | None:
    """Return the machine's limits now."""
    try:
        return measure(asked.threads)
    except NotMeasuredError as error:
        _log.print(f"the machine's limits are not known: {error}")
        return None


def rounds(
    asked: argparse.Namespace, pairs: list[Pair]
) -> tuple[dict[tuple[str, Side], dict[str, list[Row]]], Machine | None]:
    """Let all sides take turns; return their records by work and side, and the limits."""
    records: dict[tuple[str, Side], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    machines = []
    for turn in range(asked.rounds):
        machines.append(measured(asked))
        for pair in pairs:
            for side in (*pair.ours, *pair.theirs):
                for record in take_turn(pair.work, side, asked):
                    records[pair.work, side][record["work"]].append(record)
                _log.print(f"round {turn + 1}: {pair.work}, {side.name or 'loopos'}")
    known = [machine for machine in machines if machine is not None]
    if not known:
        return records, None
    names = [field.name for field in fields(Machine) if field.name != "threads"]
    middle = {name: statistics.median(getattr(m, name) for m in known) for name in names}
    return records, Machine(threads=asked.threads, **middle)


def row_of(
    ours: list[Row], theirs: list[Row], peer: str | None, buckets: bool, limit: float | None
) -> Row:
    """Return the medians of one work by one backend, beside those of one peer."""

    def middle(records: list[Row], key: str) -> float | None:
        values = [record[key] for record in records if key in record]
        return statistics.median(values) if values else None

    first, spent, peer_s = ours[0], statistics.median(r["s"] for r in ours), middle(theirs, "s")
    memory, peer_memory = middle(ours, "peak_mb"), middle(theirs, "peak_mb")
    row = {
        "work": first["work"],
        "dtype": first.get("dtype", "float32"),
        "backend": first.get("backend"),
        "loopos_s": spent,
        "peer": peer,
        "peer_s": peer_s,
        "ratio": peer_s / spent if peer_s is not None and spent else None,
        "fraction_of_limit": limit / spent if limit is not None and spent else None,
        "buckets": buckets,
        "threads": first.get("threads"),
        "rounds": len(ours),
        "limit_s": limit,
        "loopos_peak_mb": memory,
        "peer_peak_mb": peer_memory,
        "memory_ratio": memory / peer_memory if memory and peer_memory else None,
    }
    return row | (step_figures(ours, theirs) if "state_mb" in first else {})


def step_figures(ours: list[Row], theirs: list[Row]) -> Row:
    """Return what there is to say of a PPO step beside its time.

    Raises
    ------
    SystemExit
        If the peer did not do the same.
    """
    for record in theirs:
        apart = [name for name in SAME_FIGURES if record[name] != ours[0][name]]
        if apart:
            name = apart[0]
            raise SystemExit(f"{name}: {ours[0][name]} here, {record[name]} by the peer")
    peak, state = (statistics.median(r[key] for r in ours) for key in ("peak_mb", "state_mb"))
    found = {name: statistics.median(r[name] for r in ours) for name in STEP_FIGURES}
    if theirs:
        found["peer_rollout_share"] = statistics.median(r["rollout_share"] for r in theirs)
    return found | {"times_state": peak / state}


def make_rows(
    pairs: list[Pair],
    records: dict[tuple[str, Side], dict[str, list[Row]]],
    machine: Machine | None,
) -> list[Row]:
    """Return a row for each work, backend and peer."""
    rows = []
    for pair in pairs:
        for side in pair.ours:
            for work, ours in records[pair.work, side].items():
                limit = limits.seconds(work, machine, ours[0].get("dtype", "float32"))
                if pair.work == "gemm":  # the peer ran in the same process
                    theirs = [{"s": record["peer_s"]} for record in ours]
                    rows.append(row_of(ours, theirs, "openblas", False, limit))
                for peer in pair.theirs:
                    theirs = records[pair.work, peer][work]
                    rows.append(row_of(ours, theirs, peer.name, peer.buckets, limit))
                if pair.work != "gemm" and not pair.theirs:
                    rows.append(row_of(ours, [], None, False, limit))
    return rows


def check_losses(asked: argparse.Namespace, pairs: list[Pair]) -> dict[tuple[str, str], Row]:
    """Give our first weights and data to PyTorch; return the first losses of both."""
    losses = {}
    for pair in pairs:
        if pair.work not in works.TRAINING_WORKS:
            continue
        for side in pair.ours:
            with tempfile.TemporaryDirectory() as directory:
                once = ("--runs", "1", "--warmup", "0", "--threads", str(asked.threads))
                ours, _ = call((*side.command, *once, "--export", directory), asked.threads)
                torch = (str(HERE / "torch_half.py"), pair.work, *once, "--weights", directory)
                theirs, _ = call(torch, asked.threads)
            found = {"loopos_loss": ours["first_loss"], "peer_loss": theirs["first_loss"]}
            losses[pair.work, str(side.name)] = found
            _log.print(f"first loss of {pair.work}, {side.name}: {found}")
    return losses


def compare(asked: argparse.Namespace) -> tuple[list[Row], Machine | None]:
    """Do all that was asked for; return the rows and the limits."""
    if asked.rounds < 1 or asked.runs < 1 or asked.warmup < 0 or asked.threads < 1:
        parser().error("--rounds, --runs and --threads: expected at least 1; --warmup: 0")
    if not asked.no_peer and asked.warmup < LEAST_WARMUP:
        parser().error(f"--warmup: expected at least {LEAST_WARMUP}, PyTorch is cold before")
    if asked.json is not None and not asked.json.absolute().parent.is_dir():
        parser().error(f"--json: {asked.json.parent} is no directory")
    if asked.json is not None and asked.json.is_dir():
        parser().error(f"--json: {asked.json} is a directory")
    pairs = plan(asked)
    if any(pair.theirs for pair in pairs) or asked.check_losses:
        absent = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
        if absent:
            parser().error(f"{absent[0]} is not installed: install it, or give --no-peer")
    losses = check_losses(asked, pairs) if asked.check_losses else {}
    records, machine = rounds(asked, pairs)
    rows = [
        row | losses.get((row["work"], row["backend"]), {})
        for row in make_rows(pairs, records, machine)
    ]
    return rows, machine


def table(rows: list[Row]) -> Table:
    """Return what people read."""
    shown = Table()
    for title in ("work", "backend", "loopos", "peer", "", "ratio", "of limit", "MiB", "target"):
        shown.add_column(title, justify="left" if title in ("work", "target") else "right")

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    every = targets.load()
    for row in targets.with_ratios(rows):
        meant = [target for target in every if target.meant(row)]
        missed = [target for target in meant if target.multiple(row) > 1]
        verdict = "; ".join(f"missed: {t.figure} {t}" for t in missed) if missed else "met"
        memory = number(row["loopos_peak_mb"], ".0f")
        if row["peer_peak_mb"] is not None:
            memory += f" : {row['peer_peak_mb']:.0f}"
        dtype = "" if row["dtype"] == "float32" else f" {row['dtype']}"
        shown.add_row(
            row["work"] + dtype,
            row["backend"] or "",
            f"{1000 * row['loopos_s']:.3g} ms",
            "" if row["peer_s"] is None else f"{1000 * row['peer_s']:.3g} ms",
            (row["peer"] or "") + (", buckets" if row["buckets"] else ""),
            number(row["ratio"], ".2f"),
            number(row["fraction_of_limit"], ".0%"),
            memory,
            verdict if meant else "",
        )
    return shown


def wide_console() -> Console:
    """Return a console whose tables are not squeezed where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def main(arguments: list[str] | None = None) -> int:
    """Return 1 where first losses that should agree do not."""
    asked = parser().parse_args(arguments)
    rows, machine = compare(asked)
    console = wide_console()
    console.print(table(rows))
    if machine is not None:
        console.print(f"limits: {machine}")
    if asked.json is not None:
        text = ",\n".join(json.dumps(row) for row in rows)
        atomic_write_text(asked.json, f"[\n{text}\n]\n")
    apart = [
        row["work"]
        for row in rows
        if "peer_loss" in row and abs(row["loopos_loss"] - row["peer_loss"]) > LOSS_TOLERANCE
    ]
    for work in dict.fromkeys(apart):
        console.print(f"{work}: the first losses are more than {LOSS_TOLERANCE} apart")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
