"""Jinja templates that came with a model: run in a sandbox, with bounds on what they may use.

The environment is the one that templates are written for, that of transformers. A template is a
program that a stranger wrote, so beside jinja's sandbox, which keeps it from Python's objects, the
turns of its loops, its calls and the sizes of what it makes are counted.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, Sized
from datetime import datetime
from itertools import islice
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from loopos.errors import DataError, ModelFormatError

__all__ = ["Template"]

#: Turns of loops of one rendering; a call counts as several, and so does what is large: so many
#: characters are one, and so many entries of lists in lists.
_STEPS, _CALL, _STEP_SIZE, _STEP_ENTRIES = 1_000_000, 10, 1024, 8
#: Characters of one value, and of what is rendered; entries of one value.
_SIZE, _ENTRIES = 1 << 22, 1 << 18
#: Bits of a whole number.
_BITS = 4096
#: Characters that a text is brought to, by whom, and how it is written in formats.
_WIDTH = 100_000
_TAKE_WIDTHS = frozenset(
    ["center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "truncate",
     "batch", "slice", "round", "to_bytes"]
)  # fmt: skip
# Both take time in proportion to the text, whatever it is.
_WIDE = re.compile(r"(?:%|%\([^()%]*\)|\))[-+ #0]*\d*\.?\d{6,}|%[-+ #0]*\d*\.?\*")
_WIDE_FORMAT = re.compile(r"\{[^{}:]*:[^{}]*?(?:\d{6,}|\{)")
_LONG = "it makes a text or list that is too long"
_MESSAGE = 200


class _TooMuch(SecurityError):
    """A template wants more than any conversation needs."""


class _Refused(TemplateError):
    """The template itself said why it does not take these messages."""


def _checked(what: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call; what would be too large before it is measured is refused."""
    name = getattr(what, "__name__", "").removeprefix("sync_").removeprefix("do_")
    numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
    indent = kwargs.get("indent") if name == "_to_json" else None
    widths = numbers if name in _TAKE_WIDTHS else [indent] if isinstance(indent, int) else []
    if any(abs(width) > _WIDTH for width in widths):
        raise _TooMuch("it gives a function a number that is too large")
    owner = getattr(getattr(what, "__wrapped__", what), "__self__", None)
    texts = [value for value in (owner, *args) if isinstance(value, str)]
    wide = {"format": _WIDE_FORMAT if isinstance(owner, str) else _WIDE, "format_map": _WIDE_FORMAT}
    if name in wide and texts and wide[name].search(texts[0]):
        raise _TooMuch("it formats a text to a width that is too large")
    if name == "replace" and len(texts) > 2 and texts[0].count(texts[1]) * len(texts[2]) > _SIZE:
        raise _TooMuch(_LONG)
    if name == "join":
        args = tuple(list(islice(v, _SIZE)) if isinstance(v, Iterator) else v for v in args)
        parts = [value for value in args if isinstance(value, (list, tuple))]
        if sum(len(str(entry)) for part in parts for entry in part) > _SIZE:
            raise _TooMuch(_LONG)
    if name == "sum" and not isinstance(kwargs.get("start", args[3] if args[3:] else 0), int):
        raise _TooMuch(_LONG)
    return args


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of templates, which counts what they do."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.steps = 0
        self.filters["tojson"] = _to_json  # jinja's own escapes HTML
        self.filters = {name: self._guarded(filter_) for name, filter_ in self.filters.items()}
        tests: dict[str, Any] = {**self.tests}
        self.tests = {name: self._guarded(test) for name, test in tests.items()}
        self.filters[_COUNTED], self.filters[_MEASURED] = self.counted, self.measured
        self.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Names,
        }
        del self.globals["lipsum"]

    def step(self, count: int = 1) -> None:
        """Count what was done."""
        self.steps += count
        if self.steps > _STEPS:
            raise _TooMuch(f"it takes more than {_STEPS:,} steps")

    def counted(self, values: Any) -> Any:
        """Count the turns of a loop over some values."""
        if isinstance(values, Sized):
            self.step(len(values))
            return values
        return self._each(values)

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value

    def measured(self, value: Any) -> Any:
        """Return a value if it is not too large, and count its size."""
        if isinstance(value, (str, bytes)):
            if len(value) > _SIZE:
                raise _TooMuch(_LONG)
            self.step(len(value) // _STEP_SIZE)
        elif isinstance(value, _NESTING):
            self.step(_entries(value) // _STEP_ENTRIES)
        elif isinstance(value, int) and value.bit_length() > _BITS:
            raise _TooMuch("it makes a number that is too large")
        return value

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter or test that looks at what it is given and what it makes."""

        @functools.wraps(function)  # with the marks by which jinja passes its context
        def guarded(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                self.measured(value)
            return self.measured(function(*_checked(function, args, kwargs), **kwargs))

        return guarded

    def call(self, context: Any, what: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function for a template."""
        self.step(_CALL)
        for value in (getattr(what, "__self__", None), *args, *kwargs.values()):
            self.measured(value)
        args = _checked(what, args, kwargs)
        return self.measured(super().call(context, what, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Calculate for a template."""
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                several = isinstance(one, (str, list, tuple)) and isinstance(other, int)
                if several and len(one) * other > _SIZE:
                    raise _TooMuch(_LONG)
        elif operator == "**":
            whole = isinstance(left, int) and isinstance(right, int)
            if whole and left.bit_length() * abs(right) > _BITS:
                raise _TooMuch("it makes a number that is too large")
        elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise _TooMuch("it formats a text to a width that is too large")
        return self.measured(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Put counters where a template could do much without a call."""
        tree: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return tree


_COUNTED, _MEASURED = "loopos counted", "loopos measured"  # names that no template can write


class _Counting(NodeTransformer):
    """Puts a counter around what is looped over, and a measure around what is made or compared."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Count the turns."""
        self.generic_visit(node)
        node.iter = _through(_COUNTED, node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """Measure what is compared, or searched."""
        self.generic_visit(node)
        node.expr = _through(_MEASURED, node.expr)
        for operand in node.ops:
            operand.expr = _through(_MEASURED, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        """Measure a part that is cut out."""
        self.generic_visit(node)
        return _through(_MEASURED, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        """Measure a tuple, unless it is what is assigned to."""
        return self._measured(node) if node.ctx == "load" else node

    def _measured(self, node: nodes.Expr) -> nodes.Expr:
        return _through(_MEASURED, self.generic_visit(node))

    visit_Concat = visit_List = visit_Dict = _measured


def _through(filter_: str, value: Any) -> nodes.Filter:
    return nodes.Filter(value, filter_, [], [], None, None, lineno=value.lineno)


#: What holds other values, and is written with them.
_NESTING = (list, tuple, dict, set, frozenset, MappingView)


def _entries(value: Any) -> int:
    """Return how many entries lists, and lists in lists, are written with.

    A list that stands in another one twice is written twice: a few lines make more entries of such
    lists than there is memory.

    Raises
    ------
    _TooMuch
        If they are more than `_ENTRIES`.
    """
    count = 0
    waiting: list[Any] = [value]
    while waiting:
        held = waiting.pop()
        count += len(held)
        if count > _ENTRIES:
            raise _TooMuch(_LONG)
        parts = (*held.keys(), *held.values()) if isinstance(held, dict) else held
        waiting.extend(part for part in parts if isinstance(part, _NESTING))
    return count


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: Any) -> None:
    raise _Refused(str(message))


class _Names(Namespace):
    """A namespace without names that lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name of its own
        self, args = args[0], args[1:]
        given = dict(*args, **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __repr__(self) -> str:  # it may hold itself, or others many times
        return "<Namespace>"

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute '{name}'")


class _Generation(Extension):
    """``{% generation %}`` marks what a model writes; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own annotation

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands between the marks."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class Template:
    """A template, compiled.

    Parameters
    ----------
    source : str
    name : str
        What messages call it.

    Raises
    ------
    ModelFormatError
        If it is no Jinja template.
    """

    def __init__(self, source: str, name: str = "the chat template"):
        self.source, self.name = source, name
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ModelFormatError(
                f"{name}: line {error.lineno} cannot be read ({_short(error)})"
            ) from error
        except (SyntaxError, RecursionError, MemoryError, OverflowError, ValueError) as error:
            raise ModelFormatError(f"{name}: cannot be compiled ({_short(error)})") from error

    def render(self, **variables: Any) -> str:
        """Return the text that it makes.

        Raises
        ------
        DataError
            If the template itself refuses what it is given.
        ModelFormatError
            If it fails, reaches for what is not its business, or takes too much.
        """
        parts, size = [], 0
        self._environment.steps = 0
        try:
            for part in self._template.generate(**variables):
                size += len(part)
                if size > _SIZE:
                    raise _TooMuch("it writes a text that is too long")
                parts.append(part)
        except _Refused as error:
            raise DataError(f"{self.name} refuses this: {_short(error)}") from error
        except SecurityError as error:
            raise ModelFormatError(f"{self.name} is not safe: {_short(error)}") from error
        except Exception as error:  # a template can make any operation fail
            raise ModelFormatError(f"{self.name} fails: {_short(error)}") from error
        return "".join(parts)


def _short(error: BaseException) -> str:
    """Return what an error says in a part of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE else text[: _MESSAGE - 3] + "..."
