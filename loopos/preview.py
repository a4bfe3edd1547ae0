"""``loopos preview``: what a configuration trains on, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from loopos.display import plain, say
from loopos.errors import ConfigError, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from loopos.methods.language_model import Piece, Previewing

__all__ = ["preview", "show_pieces"]

#: Colours of weights, the largest first.
_COLOURS = ("bold green", "bold yellow", "bold cyan", "bold magenta")


def preview(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A configuration file (.json, .toml, .yaml), or the name of a shipped one.",
        ),
    ],
    rows: Annotated[int, typer.Option(metavar="N", help="Samples to show.")] = 3,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Override one key; may be repeated."
        ),
    ] = None,
) -> None:
    """Show what a configuration trains on.

    Text that counts in the loss is coloured, or stands in [[ ]] where there are no colours; where
    weights differ from 1 they are named.
    """
    from loopos.config import load_config
    from loopos.runner import computing, prepare

    if rows < 1:
        raise InputError(f"--rows: expected a whole number of at least 1, found {rows}")
    loaded = load_config(config, overrides or [])
    with computing(loaded):
        prepared = prepare(loaded)
        if not hasattr(prepared.trainer, "preview"):
            raise ConfigError(
                f"{loaded.where('computation.method')}: the method "
                f"'{loaded.computation.method}' does not train on tokens of its texts, "
                "so there is nothing to preview"
            )
        trainer: Previewing = prepared.trainer
        samples = trainer.preview(prepared.training, loaded.training, rows)
    show_pieces(samples)


def show_pieces(samples: Sequence[Sequence[Piece]]) -> None:
    """Print samples with what is trained on in colours, or marked where there are none.

    Parameters
    ----------
    samples : sequence of sequence of (str, float)
        The pieces of each sample and their weights.
    """
    from rich.console import Console

    console = Console(highlight=False)
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    weights = sorted({w for pieces in samples for _, w in pieces if w > 0}, reverse=True)
    for number, pieces in enumerate(samples, start=1):
        say(f"--- sample {number}")
        if coloured:
            _print(console, pieces, weights)
        else:
            say("".join(_marked(text, weight) for text, weight in pieces))
    if coloured:
        legend = [(f"weight {weight:g}", weight) for weight in weights]
        _print(
            console, [(f"{text}  ", w) for text, w in [*legend, ("not trained on", 0.0)]], weights
        )


def _marked(text: str, weight: float) -> str:
    if weight == 0:
        return text
    return f"[[{text}]]" if weight == 1 else f"[[{weight:g}: {text}]]"


def _print(console: Console, pieces: Sequence[Piece], weights: list[float]) -> None:
    from rich.text import Text

    line = Text()
    for text, weight in pieces:
        style = "dim"
        if weight > 0:
            style = _COLOURS[min(weights.index(weight), len(_COLOURS) - 1)]
        line.append(plain(text), style)
    console.print(line, soft_wrap=True)
