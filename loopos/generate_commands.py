"""``loopos generate`` and ``loopos chat``: what a language model says."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.commands import _as_utf8, _standard_input
from loopos.display import plain, say, say_json, write
from loopos.errors import (
    ConfigError,
    DataError,
    InputError,
    LooposError,
    MissingFileError,
    nearest,
)

if TYPE_CHECKING:
    from loopos.data.chat import ChatTemplate
    from loopos.data.solutions import SolutionWriter
    from loopos.data.tokenizer import Tokenizer
    from loopos.generation import Generation, SamplingOptions
    from loopos.models.transformer import Transformer

__all__ = ["chat", "generate"]

_MODEL = typer.Argument(
    metavar="MODEL",
    help="A run directory, a saved model, a .gguf file, or a model on the Hugging Face Hub.",
)
_ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")

_MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="New tokens at the most.")]
_Temperature = Annotated[
    float, typer.Option(metavar="T", help="Divides the logits; 0 takes the most likely token.")
]
_TopK = Annotated[int, typer.Option(metavar="K", help="Choose among the K most likely; 0: all.")]
_TopP = Annotated[
    float, typer.Option(metavar="P", help="Choose among the fewest tokens with this probability.")
]
_MinP = Annotated[
    float, typer.Option(metavar="P", help="Leave out what is less likely than P times the best.")
]
_Penalty = Annotated[
    float, typer.Option("--repetition-penalty", metavar="R", help="Against repetition; 1: none.")
]
_Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")
]
_Seed = Annotated[int, typer.Option(metavar="N", help="Of the random numbers.")]
_Weights = Annotated[
    str, typer.Option(metavar="TYPE", help="Compute with float32, bfloat16 or int8 weights.")
]
_Backend = Annotated[str, typer.Option(metavar="NAME", help="See 'loopos info'.")]
_Threads = Annotated[
    int | None, typer.Option(metavar="N", help="Threads of matrix products [all].")
]


@dataclass(frozen=True)
class _Loaded:
    """A language model, its tokenizer, and what lays prompts out if anything does."""

    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate | None
    writer: SolutionWriter | None = None


def generate(
    model: Annotated[str, _MODEL],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="May be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts, one a line, or rows with a field 'prompt'."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="New tokens at the most [128; 256 for a problem]."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            help="Divides the logits; 0 takes the most likely token [1; 0 for one sample of a "
            "problem, 0.7 for several].",
        ),
    ] = None,
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    min_p: _MinP = 0.0,
    repetition_penalty: _Penalty = 1.0,
    stop: _Stop = None,
    num_samples: Annotated[int, typer.Option(metavar="N", help="Texts for each prompt.")] = 1,
    seed: _Seed = 0,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Texts at once.")] = 16,
    weights: _Weights = "float32",
    backend: _Backend = "auto",
    threads: _Threads = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines: text, ids, logprobs, stop_reason...")
    ] = False,
    as_chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Take prompts as what a user says (as problems, where the model learnt to solve "
            "them), or as text to go on with [chat where the model has a template].",
        ),
    ] = None,
) -> None:
    """Generate text with a language model.

    Prompts are given as options, in a file, or line by line on standard input. New text goes to
    standard output, tokens per second to standard error. A model that learnt chain of thought is
    asked problems, and answers with its steps and the answer.
    """
    solves = as_chat is not False and _solves(model)
    length, warmth = _usual(solves, num_samples)
    options = _options(
        max_new_tokens=length if max_new_tokens is None else max_new_tokens,
        temperature=warmth if temperature is None else temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, stop=stop, num_samples=num_samples,
        seed=seed,
    )  # fmt: skip
    given = _prompts(prompt, prompts)
    with _computing(backend, threads):
        loaded = _load(model, chat=as_chat, solves=solves)
        options, wanted = _for_template(loaded, given, options)
        with _as_asked():
            if len(wanted) == 1 and num_samples == 1 and not as_json and sys.stdout.isatty():
                _stream(loaded, wanted[0], options, weights)
                return
            _generate(loaded, given, wanted, options, batch_size, weights, as_json)


def _solves(name: str) -> bool:
    """Whether a model was saved with the way in which problems are written."""
    from loopos.methods.reasoning import kept_template

    return kept_template(Path(_source(name))) is not None


def _usual(solves: bool, num_samples: int) -> tuple[int, float]:
    """Return how many tokens are generated, and at which temperature, if nobody says."""
    if not solves:
        return 128, 1.0
    from loopos.methods.reasoning import Options

    return Options().max_new_tokens, Options().temperature if num_samples > 1 else 0.0


def _options(stop: Sequence[str] | None, **named: Any) -> SamplingOptions:
    """Return sampling options; what is wrong is said of the option of the command line."""
    from loopos.generation import SamplingOptions

    try:
        return SamplingOptions(stop=tuple(_as_utf8(text) for text in stop or ()), **named)
    except ConfigError as error:
        name, _, message = str(error).partition(": ")
        raise InputError(f"--{name.replace('_', '-')}: {message}") from error


def _prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    if given and file is not None:
        raise InputError("give either --prompt or --prompts, not both")
    if given:
        found = [_as_utf8(text) for text in given]
    elif file is not None:
        found = _prompts_of(file)
    else:
        found = _standard_input()
    if not found:
        raise InputError("there is no prompt")
    return found


def _prompts_of(file: Path) -> list[str]:
    from loopos.data.readers import read_texts

    if file.is_dir():
        raise InputError(f"{file}: is a directory, expected a file of prompts")
    if file.suffix.lower() in _ROWS:
        read = read_texts(file, "prompt")
        if read.dropped:
            places = ", ".join(read.dropped[:5]) + (", ..." if len(read.dropped) > 5 else "")
            _note(f"left out, as there is no text: {places}")
        return list(read.texts)
    from loopos.files import read_text

    if not file.exists():
        raise MissingFileError(f"{file}: no such file")
    lines = read_text(file, DataError).split("\n")
    return [line.rstrip("\r") for line in lines if line.strip()]


@contextmanager
def _computing(backend: str, threads: int | None) -> Iterator[None]:
    from loopos.backends import use_backend
    from loopos.backends.threads import thread_limit

    if threads is not None and threads < 1:
        raise InputError(f"--threads: expected a whole number of at least 1, found {threads}")
    with ExitStack() as stack:
        if backend != "auto":
            stack.enter_context(use_backend(backend))
        stack.enter_context(thread_limit(threads))
        yield


@contextmanager
def _as_asked() -> Iterator[None]:
    """Say what is wrong in the words of the command line: its options, prompts counted from 1."""
    try:
        yield
    except LooposError as error:
        name, colon, message = str(error).partition(": ")
        if colon and name in ("weights", "batch_size"):
            raise InputError(f"--{name.replace('_', '-')}: {message}") from error
        counted = re.sub(
            r"\bprompt (\d+)\b", lambda m: f"prompt {int(m[1]) + 1}", str(error), count=1
        )
        raise type(error)(counted) from error


def _load(name: str, *, chat: bool | None, solves: bool = False) -> _Loaded:
    """Load a language model; the writer of its problems, or its template if `chat` is not False."""
    from loopos.data.chat import ChatTemplate
    from loopos.data.tokenizer import load_tokenizer
    from loopos.models.weights import load_config, load_model

    source = _source(name)
    config = load_config(source)
    if not config.causal or not config.lm_head:
        raise InputError(f"{source}: is no language model, so it cannot generate text")
    tokenizer = load_tokenizer(source)
    if solves:
        from loopos.data.solutions import SolutionWriter
        from loopos.methods.reasoning import kept_template

        kept = kept_template(Path(source))
        assert kept is not None
        return _Loaded(load_model(source), tokenizer, None, SolutionWriter(tokenizer, *kept))
    template = None
    if chat or (chat is None and tokenizer.chat_template):
        if not tokenizer.chat_template:
            raise InputError(
                f"{source}: the model has no chat template, so it cannot chat; "
                f"'loopos generate {name} --no-chat' goes on with a text"
            )
        template = ChatTemplate(tokenizer)
    return _Loaded(load_model(source), tokenizer, template)


def _source(name: str) -> str:
    """Return where the model of a run is, or what was named."""
    directory = Path(name)
    inner = directory / "model"
    if not inner.is_dir():
        if (directory / "metrics.jsonl").exists() and not (
            directory / "model.safetensors"
        ).exists():
            raise InputError(
                f"{name}: this run has not finished, so there is no model in it; "
                "continue it with 'loopos run CONFIG --resume'"
            )
        inner = directory
    if (inner / "classifier.json").exists():
        raise InputError(f"{inner}: is a classifier, which 'loopos predict' is for")
    return name if inner == directory else str(inner)


def _for_template(
    loaded: _Loaded, prompts: list[str], options: SamplingOptions
) -> tuple[SamplingOptions, list[Any]]:
    """Return prompts as they are given to the model, and the options with what ends a turn."""
    from dataclasses import replace

    if loaded.writer is not None:
        writer = loaded.writer
        options = replace(options, stop_ids=writer.stop_ids)
        return options, [writer.prompt(problem) for problem in prompts]
    if loaded.template is None:
        return options, list(prompts)
    options = replace(options, stop_ids=loaded.template.stop_ids)
    turns = [[{"role": "user", "content": text}] for text in prompts]
    return options, [loaded.template.prompt(messages) for messages in turns]


def _stream(loaded: _Loaded, prompt: Any, options: SamplingOptions, weights: str) -> None:
    from loopos.generation import Session

    session = Session(loaded.model, loaded.tokenizer, weights)
    begin = time.perf_counter()
    for piece in session.stream(prompt, options):
        write(piece)
    say()
    if session.last is not None:
        _show_speed(len(session.last.ids), time.perf_counter() - begin)


def _generate(
    loaded: _Loaded,
    given: list[str],
    wanted: list[Any],
    options: SamplingOptions,
    batch_size: int,
    weights: str,
    as_json: bool,
) -> None:
    from loopos.generation import generate as generate_texts

    begin = time.perf_counter()
    found = generate_texts(
        loaded.model, wanted, options, tokenizer=loaded.tokenizer, batch_size=batch_size,
        weights=weights,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    for generation in found:
        if as_json:
            say_json(_fields(loaded, generation, given))
            continue
        if len(found) > 1:
            sample = f", sample {generation.sample_index + 1}" if options.num_samples > 1 else ""
            say(f"--- prompt {generation.prompt_index + 1}{sample}")
        say(str(generation.text))
    _show_speed(sum(len(generation.ids) for generation in found), seconds)


def _fields(loaded: _Loaded, generation: Generation, given: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "prompt": given[generation.prompt_index],
        "prompt_index": generation.prompt_index,
        "sample_index": generation.sample_index,
        "text": generation.text,
        "ids": generation.ids.tolist(),
        "logprobs": generation.logprobs.tolist(),
        "stop_reason": generation.stop_reason,
    }
    if loaded.writer is not None:
        from loopos.methods.solving import answer_in

        template, text = loaded.writer.template, generation.text or ""
        fields |= {"steps": template.parse(text)[0], "answer": answer_in(text, template)}
    return fields


def _show_speed(tokens: int, seconds: float) -> None:
    rate = tokens / max(seconds, 1e-9)
    print(f"{tokens} tokens in {seconds:.2f} s ({rate:.1f} tokens/s)", file=sys.stderr)


# -- conversations ---------------------------------------------------------------------------------

_COMMANDS = {
    "/reset": "begin anew",
    "/quit": "leave, as Ctrl-D does",
    "/help": "show these commands",
}


def chat(
    model: Annotated[str, _MODEL],
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told first.")
    ] = None,
    max_new_tokens: _MaxNewTokens = 512,
    temperature: _Temperature = 1.0,
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    min_p: _MinP = 0.0,
    repetition_penalty: _Penalty = 1.0,
    stop: _Stop = None,
    seed: _Seed = 0,
    weights: _Weights = "float32",
    backend: _Backend = "auto",
    threads: _Threads = None,
) -> None:
    """Talk to a language model.

    /reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer. Each line of standard input
    is a message.
    """
    options = _options(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, stop=stop, seed=seed,
    )  # fmt: skip
    with _computing(backend, threads):
        loaded = _load(model, chat=True)
        assert loaded.template is not None
        with _as_asked():
            talk = _Talk(loaded, loaded.template, options, system, weights)
        if sys.stdin.isatty():
            _note(f"{'; '.join(f'{name}: {what}' for name, what in _COMMANDS.items())}")
        for line in _messages():
            if line.startswith("/"):
                if not _obey(line.strip(), talk):
                    break
            else:
                try:
                    talk.answer(line)
                except KeyboardInterrupt:  # before or after the answer itself
                    _note("stopped")


def _messages() -> Iterator[str]:
    """Yield what the user says, line by line, up to the end of standard input."""
    if not sys.stdin.isatty():
        for number, raw in enumerate(sys.stdin.buffer, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"standard input:{number}: not UTF-8 text") from error
            if line.strip():
                yield line.rstrip("\r\n")
        return
    try:
        import readline  # noqa: F401  # input() is edited by it where there is one
    except ImportError:
        _note("lines cannot be edited here, as Python has no readline")
    while True:
        try:
            line = input("> ")
        except EOFError:
            say()
            return
        except KeyboardInterrupt:
            say()
            _note("Ctrl-D or /quit leaves")
            continue
        if line.strip():
            yield line


def _obey(command: str, talk: _Talk) -> bool:
    """Carry out a command; False ends the conversation."""
    if command == "/quit":
        return False
    if command == "/reset":
        talk.reset()
        _note("a new conversation")
    elif command == "/help":
        for name, what in _COMMANDS.items():
            _note(f"{name:<8} {what}")
    else:
        known = ", ".join(_COMMANDS)
        _note(f"unknown command '{command}'{nearest(command, _COMMANDS)} (known: {known})")
    return True


def _note(text: str) -> None:
    """Say what is not the model's on standard error."""
    print(plain(text), file=sys.stderr, flush=True)


class _Talk:
    """A conversation, of which what was computed is kept from turn to turn."""

    def __init__(
        self,
        loaded: _Loaded,
        template: ChatTemplate,
        options: SamplingOptions,
        system: str | None,
        weights: str,
    ):
        from dataclasses import replace

        from loopos.generation import Session

        self._template, self._limit = template, loaded.model.config.max_seq_len
        self._session = Session(loaded.model, loaded.tokenizer, weights)
        self._options = replace(options, stop_ids=template.stop_ids)
        self._opening = [] if system is None else [{"role": "system", "content": _as_utf8(system)}]
        if self._opening:  # a template may refuse it: better now than after the first message
            template.render([*self._opening, {"role": "user", "content": "a"}])
        self._turns = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._messages = list(self._opening)

    def answer(self, text: str) -> None:
        """Say something, and print the answer as it comes."""
        from dataclasses import replace

        asked = [*self._messages, {"role": "user", "content": text}]
        prompt = self._template.prompt(asked)
        if prompt.size >= self._limit:
            self._full()
            return
        # Each answer has random numbers of its own.
        options = replace(self._options, seed=self._options.seed + self._turns)
        self._turns += 1
        pieces: list[str] = []
        stopped = False
        try:
            for piece in self._session.stream(prompt, options):
                pieces.append(piece)
                write(piece)
        except KeyboardInterrupt:
            stopped = True
        say()
        self._messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        if stopped:
            _note("stopped")
        elif self._session.last is not None and self._session.last.stop_reason == "context":
            self._full()

    def _full(self) -> None:
        _note(
            f"the conversation fills the {self._limit} tokens that the model can take; "
            "/reset begins a new one"
        )
