"""One self-contained HTML page of a run: verdict, curves, samples, figures, data, machine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from loopos.errors import OutputError
from loopos.files import atomic_write_text, read_text
from loopos.reporting.catalogue import OTHERS, charts_of, constants_of, main_chart, tiles_of
from loopos.reporting.charts import HEIGHT, SMOOTHED_SHARE, WIDTH, Chart
from loopos.reporting.doctor import diagnose
from loopos.reporting.findings import shown
from loopos.reporting.records import RunRecords, number, read_run
from loopos.version import __version__

__all__ = ["report_page", "write_report"]

_TEMPLATE = Path(__file__).with_name("page.html")
#: Rows of a table of samples, and characters of a text in it.
_ROWS, _TEXT = 8, 600
#: Of a list or a nested value in a table.
_VALUE = 300
#: Classes (or rows) of a table beyond which it is cut.
_MOST_ROWS = 30


def write_report(directory: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run; return where it is.

    Parameters
    ----------
    directory : path
        Of the run.
    output : path, optional
        ``report.html`` in the run's directory by default. What stands there is replaced at once.

    Raises
    ------
    InputError
        As :func:`loopos.reporting.read_run`.
    OutputError
        If it cannot be written.
    """
    run = read_run(directory)
    target = run.directory / "report.html" if output is None else Path(output)
    if target.is_dir():
        raise OutputError(f"{target}: is a directory, so the page cannot be written there")
    atomic_write_text(target, report_page(run))
    return target


def report_page(run: RunRecords) -> str:
    """Return the page as HTML; whatever the records hold is shown as text, never as markup."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    template = environment.from_string(read_text(_TEMPLATE))
    page = template.render(
        run=run,
        diagnosis=diagnose(run),
        progress=_progress(run),
        description=_section(run.config, "computation").get("description", ""),
        chapters=[_Chapter.of(part) for part in _in_order(run) if part.steps or part.evaluations],
        data=_data(run.data_report),
        warnings=[str(w) for w in run.data_report.get("warnings") or ()],
        classes=_classes(run.data_report),
        configuration=_configuration(run),
        machine=_machine(run),
        version=__version__,
        smooth_share=SMOOTHED_SHARE,
        width=WIDTH,
        height=HEIGHT,
    )
    # A lone surrogate, as JSON may hold, is no UTF-8.
    return page.encode("utf-8", "replace").decode("utf-8")


def _in_order(run: RunRecords) -> list[RunRecords]:
    """Return the parts of a run as they were trained: a reward model before the policy."""
    before = [part for part in run.parts if part.name == "reward_model"]
    return [*before, run, *(part for part in run.parts if part.name != "reward_model")]


def _progress(run: RunRecords) -> str:
    metrics = run.directory / "metrics.jsonl"
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    said = [f"step {run.last_step:,}{total}"] if run.steps or run.evaluations else []
    if run.ending:
        left = run.steps_made and not run.finished
        said.append(run.ending + ("; continue it with --resume" if left else ""))
    said += [f"{name} ends in half a line" for name in run.torn]
    if metrics.is_file():
        when = datetime.fromtimestamp(metrics.stat().st_mtime).astimezone()
        said.append(f"last record {when:%Y-%m-%d %H:%M %Z}")
    return " · ".join(said)


# -- a run or a part of one ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chapter:
    """What is shown of a run, and of each of its parts."""

    name: str
    method: str
    tiles: list[tuple[str, str, str]]
    main: Chart | None
    groups: dict[str, list[Chart]]
    others: list[Chart]
    constants: dict[str, str]
    samples: list[dict[str, Any]]
    figures: list[tuple[str, str]]
    tables: list[dict[str, Any]]

    @classmethod
    def of(cls, run: RunRecords) -> _Chapter:
        main = main_chart(run)
        groups = charts_of(run, without="" if main is None else main.name)
        figures, tables = _evaluation(run)
        return cls(
            run.name, run.method_title, tiles_of(run), main, groups, groups.pop(OTHERS, []),
            constants_of(run),
            _samples(run), figures, tables,
        )  # fmt: skip


def _samples(run: RunRecords) -> list[dict[str, Any]]:
    """Return the tables of samples of the first, the middle and the last step that has one."""
    tables = list(run.sample_tables.items())
    if not tables:
        return []
    chosen = sorted({0, (len(tables) - 1) // 2, len(tables) - 1})
    names = {0: "Start", len(tables) - 1: "End"} if len(tables) > 1 else {}
    return [
        {
            "title": names.get(at, "Middle" if len(tables) > 1 else "Samples"),
            "step": tables[at][0],
            "rows": _sample_rows(tables[at][1][:_ROWS]),
            "more": max(0, len(tables[at][1]) - _ROWS),
        }
        for at in chosen
    ]


def _sample_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    scores = [number(row.get("score")) for row in rows]
    whole = all(score is None or (math.isfinite(score) and score % 1 == 0) for score in scores)
    return [
        {
            "prompt": _cut(_as_text(row.get("prompt"))),
            "response": _cut(_as_text(row.get("response"))),
            "score": "" if score is None else f"{score:.0f}" if whole else f"{score:.3f}",
            "tokens": _cell(row.get("tokens")) if "tokens" in row else "",
            "ended": row.get("ended"),
        }
        for row, score in zip(rows, scores, strict=True)
    ]


def _as_text(value: Any) -> str:
    """Return a prompt as text: it may be ids, or the messages of a conversation."""
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _cut(text: str) -> str:
    left = len(text) - _TEXT
    return f"{text[:_TEXT]} … {left:,} more characters" if left > 0 else text


# -- evaluation ------------------------------------------------------------------------------------


def _evaluation(run: RunRecords) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """Return the final figures: single numbers, and tables; none of a run that is not finished."""
    figures: list[tuple[str, str]] = []
    tables: list[dict[str, Any]] = []
    for name, value in _flat(run.last_evaluation if run.finished else {}):
        table = _table(run, name, value)
        if table is not None:
            tables.append(table)
        elif number(value) is not None:
            figures.append((name, _cell(value)))
        else:
            figures.append((name, _short(value)))
    return figures, tables


def _flat(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in figures.items():
        columns = isinstance(value, Mapping) and all(isinstance(v, list) for v in value.values())
        if isinstance(value, Mapping) and value and not columns:
            found += _flat(value, f"{prefix}{name} / ")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _table(run: RunRecords, name: str, value: Any) -> dict[str, Any] | None:
    """Return a table of columns by name, of rows with names, or of a matrix; else None."""
    title = name.replace("_", " ").capitalize()
    if isinstance(value, Mapping) and value:  # columns, one value a class
        columns = list(value.values())
        count = min(len(column) for column in columns)
        names = _labels(run, count)
        rows = [[names[i], *(_cell(column[i]) for column in columns)] for i in range(count)]
        return _limited(title, ["", *value], rows)
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(row, Mapping) for row in value):
        heads = list(dict.fromkeys(key for row in value for key in row))
        return _limited(title, heads, [[_cell(row.get(h)) for h in heads] for row in value])
    if all(isinstance(row, list) for row in value):
        names = _labels(run, len(value))
        rows = [[names[i], *map(_cell, row)] for i, row in enumerate(value)]
        return _limited(f"{title} (rows: true, columns: predicted)", ["", *names], rows)
    return None


def _limited(title: str, heads: list[str], rows: list[list[str]]) -> dict[str, Any]:
    heads = [head.replace("_", " ") for head in heads]
    return {"title": title, "heads": heads, "rows": rows[:_MOST_ROWS],
            "more": max(0, len(rows) - _MOST_ROWS)}  # fmt: skip


def _labels(run: RunRecords, count: int) -> list[str]:
    return run.labels if len(run.labels) == count else [str(i) for i in range(count)]


def _cell(value: Any) -> str:
    found = number(value)
    if found is None:
        return _short(value)
    # As many decimals as above and below it, so that columns align.
    fixed = found == 0 or 1e-3 <= abs(found) < 1e4
    return f"{value:,}" if isinstance(value, int) else f"{found:.4f}" if fixed else shown(found)


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _VALUE else f"{text[:_VALUE]} …"


# -- data, configuration, machine --------------------------------------------------------------


def _data(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the data report as names and values; what was not found is not listed."""
    found = []
    for name, value in report.items():
        said = name.replace("_", " ")
        if name in ("classes", "validation_classes", "warnings") or value in (None, [], {}):
            continue
        if isinstance(value, dict) and "count" in value:
            places = ", ".join(map(str, value.get("places") or ()))
            found.append((said, f"{_cell(value['count'])}" + (f" ({places})" if places else "")))
        elif isinstance(value, dict):
            found.append((said, ", ".join(f"{key} {_cell(v)}" for key, v in value.items())))
        else:
            found.append((said, _cell(value)))
    return found


def _classes(report: Mapping[str, Any]) -> list[tuple[str, str, str, float]]:
    """Return each class with its rows, its validation rows, and its share of the most frequent."""
    classes, held_out = _section(report, "classes"), _section(report, "validation_classes")
    counts = {name: number(v) or 0.0 for name, v in classes.items()}
    most = max(counts.values(), default=0.0) or 1.0
    return [
        (name, f"{count:,.0f}", _cell(held_out[name]) if name in held_out else "",
         round(100 * count / most, 1) if math.isfinite(count) else 0.0)
        for name, count in list(counts.items())[:_MOST_ROWS]
    ]  # fmt: skip


def _configuration(run: RunRecords) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return sections of keys and values; of a run without a configuration, all its options."""
    sections = [
        (name, [(key, _short(value)) for key, value in values.items() if value is not None])
        for name, values in run.config.items() if isinstance(values, dict)
    ]  # fmt: skip
    given = {key for key, _ in dict(sections).get("training", [])}
    rest = [
        (key, _short(value)) for key, value in _section(run.state, "options").items()
        if key not in given and value is not None
    ]  # fmt: skip
    title = "training, defaults" if sections else "training"
    return [*sections, *([(title, rest)] if rest else [])]


def _machine(run: RunRecords) -> list[tuple[str, str]]:
    """Return what computed: as the newest checkpoint has it."""
    state = next((r.state for r in (run, *run.parts) if r.state), {})
    backend = _section(state, "backend")
    found = [
        (name, _short(backend[name])) for name in backend if name not in ("native", "inherited")
    ]
    found = [("backend" if name == "name" else name, value) for name, value in found]
    natives = backend.get("native")
    if isinstance(natives, list):
        inherited = backend.get("inherited")
        rest = f", {len(inherited)} of NumPy's" if isinstance(inherited, list) and inherited else ""
        found.append(("operations", f"{len(natives)} of its own{rest}"))
    for key, said in (("loopos_version", "loopos"), ("seed", "seed"), ("num_samples", "samples")):
        if key in state:
            found.append((said, _cell(state[key]) if key == "num_samples" else _short(state[key])))
    return found


def _section(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}
