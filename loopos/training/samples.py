"""Prompts, responses and their scores as people see them: a table, or lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["sample_lines", "samples_table", "shown"]

#: Characters of a prompt and of a response in a line.
_PROMPT, _RESPONSE = 60, 120
#: What the columns of numbers take of a table's width.
_NUMBERS = 28


def shown(content: Any, width: int, end: bool = False) -> str:
    """Return a text, or token ids, as one line of at most `width` characters.

    Parameters
    ----------
    content : str or sequence of int
    width : int
    end : bool
        Keep the end of a longer text, not its beginning.
    """
    text = content if isinstance(content, str) else " ".join(map(str, content))
    # Control characters would act on the terminal instead of being shown.
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) <= width:
        return text
    return "..." + text[3 - width :] if end else text[: width - 3] + "..."


def sample_lines(step: int, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield two lines for each sample."""
    for row in rows:
        yield f"step {step}  prompt: {shown(row['prompt'], _PROMPT, end=True)}"
        ended = "" if row["ended"] else ", not ended"
        response = shown(row["response"], _RESPONSE)
        yield f"  {row['score']:.3f}  {row['tokens']} tokens{ended}: {response}"


def samples_table(step: int, rows: Sequence[Mapping[str, Any]], width: int) -> Any:
    """Return a table for a terminal of `width` columns."""
    from rich.table import Table
    from rich.text import Text

    room = max(24, width - _NUMBERS)
    columns = room // 3, room - room // 3
    caption = "" if all(row["ended"] for row in rows) else "+: without an end"
    table = Table(title=f"samples of step {step}", caption=caption, expand=True)
    table.add_column("prompt", ratio=1, no_wrap=True)
    table.add_column("response", ratio=2, no_wrap=True)
    for name in ("score", "tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        prompt = shown(row["prompt"], columns[0], end=True)
        response = shown(row["response"], columns[1])
        tokens = f"{row['tokens']}{'' if row['ended'] else '+'}"
        table.add_row(Text(prompt), Text(response), f"{row['score']:.3f}", tokens)
    return table
