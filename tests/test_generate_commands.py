"""``loopos generate``, ``chat`` and ``preview`` as people use them, in processes of their own."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import loopos as library
from loopos.backends import get_backend
from loopos.data.chat import ChatTemplate
from loopos.data.reasoning import read_reasoning
from loopos.data.solutions import SolutionTemplate
from loopos.data.tokenizer import train_bpe
from loopos.generation import generate
from loopos.preview import show_pieces

LOOPOS = str(Path(sys.executable).with_name("loopos"))
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("LOOPOS", "COLUMNS"))} | {
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": f"{word}?"},
                  {"role": "assistant", "content": f"It is {word} 五 😀."}]}
    for word in ("red", "blue", "green")
]  # fmt: skip
ANSWER = "It is blue 五 😀."
SPEED = r"\d+ tokens in \d+\.\d\d s \(\d+\.\d tokens/s\)\n"


def loopos(*arguments, cwd, code=0, stdin=""):
    done = subprocess.run(
        [LOOPOS, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, input=stdin.encode(),
        capture_output=True, timeout=120,
    )  # fmt: skip
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, out + err
    assert "Traceback" not in out + err
    assert "\x1b" not in out + err
    return out, err


def refused(*arguments, cwd, **keywords):
    """Return the one sentence with which a command is refused."""
    out, err = loopos(*arguments, cwd=cwd, code=2, **keywords)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a directory with a finished run, and what the command printed at its end."""
    directory = tmp_path_factory.mktemp("chat")
    (directory / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    corpus = [m["content"] for row in ROWS for m in row["messages"]] + ["user assistant system\n"]
    tokenizer = train_bpe(corpus, 320)
    tokenizer._backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    sizes = {"d_model": 32, "num_heads": 2, "num_layers": 1, "d_ff": 64, "max_seq_len": 96}
    config = library.TransformerConfig(vocab_size=tokenizer.vocab_size, **sizes)
    model = library.Transformer(config, seed=0)
    model.save(directory / "plain", tokenizer)
    tokenizer.chat_template = TEMPLATE
    model.save(directory / "base", tokenizer)
    values = {
        "computation": {"method": "sft"},
        "training": {"learning_rate": 0.005, "batch_size": 3, "num_epochs": 400,
                     "save_steps": 1000},
        "data": {"training_data": "t.jsonl", "pretrained_weights": "base",
                 "output_dir": "out", "validation_fraction": 0},
    }  # fmt: skip
    (directory / "run.json").write_text(json.dumps(values))
    out, _ = loopos("run", "run.json", cwd=directory)
    assert out.endswith("next: loopos chat out\n")
    return directory


# -- preview ---------------------------------------------------------------------------------------


def test_a_preview_marks_what_is_trained_on(project):
    out, err = loopos("preview", "run.json", "--rows", "2", cwd=project)
    assert err == ""
    assert out == "".join(
        f"--- sample {i + 1}\n<|im_start|>user\n{word}?<|im_end|>\n<|im_start|>assistant\n"
        f"[[It is {word} 五 😀.<|im_end|>]]\n\n"
        for i, word in enumerate(("red", "blue"))
    )
    out, _ = loopos("preview", "run.json", "--rows", "1", "--set", "training.train_on=all",
                    cwd=project)  # fmt: skip
    assert out.startswith("--- sample 1\n<|im_start|>[[user\nred?<|im_end|>\n")
    assert "expected a whole number of at least 1" in refused(
        "preview", "run.json", "--rows", "0", cwd=project
    )
    found = refused("preview", "demo", cwd=project)
    assert found.endswith(
        "the method 'fine_tuning' does not train on tokens of its texts, "
        "so there is nothing to preview"
    )


def test_weights_other_than_one_are_named(capsys):
    show_pieces([[("prompt ", 0.0), ("steps ", 0.5), ("\x1b[31m answer", 1.0)]])
    expected = "--- sample 1\nprompt [[0.5: steps ]][[\\x1b[31m answer]]\n"
    assert capsys.readouterr().out == expected


def test_a_preview_on_a_terminal_has_colours(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    pieces = [("<|im_start|>[bold] ", 0.0), ("steps ", 0.5), ("五\n", 1.0)]
    show_pieces([pieces])
    out = capsys.readouterr().out
    assert out.splitlines()[1] == (
        "\x1b[2m<|im_start|>[bold] \x1b[0m\x1b[1;33msteps \x1b[0m\x1b[1;32m五\x1b[0m"
    )
    assert "\x1b[1;33mweight 0.5  \x1b[0m" in out
    monkeypatch.setenv("NO_COLOR", "1")
    show_pieces([pieces])
    assert "[[0.5: steps ]]" in capsys.readouterr().out


# -- generate --------------------------------------------------------------------------------------


def test_generate_says_what_was_learned(project):
    out, err = loopos("generate", "out", "--prompt", "blue?", "--temperature", "0", cwd=project)
    assert out == f"{ANSWER}\n"
    assert re.fullmatch(SPEED, err)
    same, _ = loopos("generate", "out/model", "--temperature", "0", cwd=project, stdin="blue?\n")
    assert same == out


def test_json_can_hold_any_character(project):
    asked = "a\x7fb\x85c\u2028é"
    out, _ = loopos("generate", "plain", "--prompt", asked, "--max-new-tokens", 2, "--json",
                    cwd=project)  # fmt: skip
    (line,) = out.removesuffix("\n").split("\n")
    assert "\\u007fb\\u0085c" in line
    assert json.loads(line)["prompt"] == asked


def test_json_lines_are_what_the_library_generates(project):
    asked = ["--prompt", "blue?", "--prompt", "red?", "--num-samples", 2, "--seed", 3,
             "--top-k", 5, "--top-p", 0.9, "--min-p", 0.01, "--temperature", 1.5,
             "--repetition-penalty", 1.2, "--max-new-tokens", 9]  # fmt: skip
    out, _ = loopos("generate", "out", *asked, "--json", cwd=project)
    rows = [json.loads(line) for line in out.splitlines()]
    model = library.load_model(project / "out" / "model")
    tokenizer = library.load_tokenizer(project / "out" / "model")
    template = ChatTemplate(tokenizer)
    prompts = [template.prompt([{"role": "user", "content": text}]) for text in ("blue?", "red?")]
    expected = generate(
        model, prompts, tokenizer=tokenizer, num_samples=2, seed=3, top_k=5, top_p=0.9,
        min_p=0.01, temperature=1.5, repetition_penalty=1.2, max_new_tokens=9,
        stop_ids=template.stop_ids,
    )  # fmt: skip
    assert [row["prompt"] for row in rows] == ["blue?", "blue?", "red?", "red?"]
    for row, generation in zip(rows, expected, strict=True):
        assert row["ids"] == generation.ids.tolist()
        np.testing.assert_allclose(row["logprobs"], generation.logprobs, rtol=1e-6)
        assert (row["text"], row["stop_reason"]) == (generation.text, generation.stop_reason)
        assert (row["prompt_index"], row["sample_index"]) == (
            generation.prompt_index, generation.sample_index,
        )  # fmt: skip
    lines, _ = loopos("generate", "out", *asked, cwd=project)
    assert lines == "".join(
        f"--- prompt {row['prompt_index'] + 1}, sample {row['sample_index'] + 1}\n{row['text']}\n"
        for row in rows
    )


def test_prompts_come_from_files_and_standard_input(project):
    (project / "p.txt").write_text("red?\r\n\nblue?\n", encoding="utf-8")
    (project / "p.jsonl").write_text('{"prompt": "red?"}\n{"prompt": " "}\n{"prompt": "blue?"}\n')
    expected = "--- prompt 1\nIt is red 五 😀.\n--- prompt 2\nIt is blue 五 😀.\n"
    greedy = ["generate", "out", "--temperature", "0"]
    for arguments, stdin in (
        (["--prompts", "p.txt"], ""),
        (["--prompts", "p.jsonl", "--batch-size", "1"], ""),
        ([], "red?\nblue?\n"),
    ):
        assert loopos(*greedy, *arguments, cwd=project, stdin=stdin)[0] == expected
    if Path("/dev/stdin").exists():  # a pipe, as <(command) of a shell is
        arguments = [*greedy, "--prompts", "/dev/stdin"]
        assert loopos(*arguments, cwd=project, stdin="red?\nblue?\n")[0] == expected


def test_texts_are_gone_on_with_without_a_template(project):
    text = "<|im_start|>user\nblue?<|im_end|>\n<|im_start|>assistant\nIt is"
    for arguments in (["--no-chat"], ["--no-chat", "--backend", "numpy", "--threads", "1"]):
        out, _ = loopos("generate", "out", *arguments, "--prompt", text, "--temperature", "0",
                        "--stop", "😀", cwd=project)  # fmt: skip
        assert out == " blue 五 \n"
    out, _ = loopos("generate", "plain", "--prompt", "red", "--max-new-tokens", "4", "--json",
                    cwd=project)  # fmt: skip
    (row,) = map(json.loads, out.splitlines())
    assert (len(row["ids"]), row["stop_reason"]) == (4, "length")


@pytest.mark.skipif(not hasattr(get_backend(), "quantize"), reason="a backend without it")
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_smaller_weights_say_the_same(project, kind):
    out, _ = loopos("generate", "out", "--weights", kind, "--prompt", "blue?", "--temperature",
                    "0", cwd=project)  # fmt: skip
    assert out == f"{ANSWER}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--prompt", "a", "--temperature", "-1"],
         "--temperature: expected a number of at least 0, found -1.0"),
        (["out", "--prompt", "a", "--max-new-tokens", "0"],
         "--max-new-tokens: expected a whole number of at least 1, found 0"),
        (["out", "--prompt", "a", "--threads", "0"],
         "--threads: expected a whole number of at least 1, found 0"),
        (["out", "--prompt", "a", "--prompts", "p.txt"],
         "give either --prompt or --prompts, not both"),
        (["out"], "there is no prompt"),
        (["out", "--prompts", "none.txt"], "none.txt: no such file"),
        (["out", "--prompts", "base"], "base: is a directory, expected a file of prompts"),
        (["out", "--prompt", "a", "--batch-size", "0"],
         "--batch-size: expected a whole number from 1, found 0"),
        (["out", "--prompt", "a", "--weights", "int9"],
         "--weights: expected one of float32, bfloat16, int8, found 'int9'; did you mean 'int8'?"),
        (["plain", "--prompt", "a", "--chat"],
         "plain: the model has no chat template, so it cannot chat; "
         "'loopos generate plain --no-chat' goes on with a text"),
        (["nothing", "--prompt", "a"], "nothing: no such directory"),
        (["out", "--prompt", "a", "--prompt", "a " * 200],
         "prompt 2 has "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(project, arguments, message):
    assert refused("generate", *arguments, cwd=project).startswith(message)


def test_other_models_are_refused(project, tmp_path):
    (project / "started").mkdir(exist_ok=True)
    (project / "started" / "metrics.jsonl").write_text("")
    assert refused("generate", "started", "--prompt", "a", cwd=project).startswith(
        "started: this run has not finished, so there is no model in it; "
    )
    base = Path(library.__file__).parent / "assets" / "base_model"
    tuner = library.FineTuner(library.load_model(base), library.load_tokenizer(base), num_classes=2)
    tuner.save(tmp_path / "classifier")
    assert refused("generate", tmp_path / "classifier", "--prompt", "a", cwd=project).endswith(
        "classifier: is a classifier, which 'loopos predict' is for"
    )


def test_a_template_that_attacks_is_one_sentence(project, tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((project / "base" / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    for command in (["generate", tmp_path, "--prompt", "a"], ["chat", tmp_path]):
        assert refused(*command, cwd=project, stdin="a\n") == (
            "the chat template is not safe: access to attribute '__class__' of 'list' object is "
            "unsafe."
        )


@pytest.fixture(scope="module", params=[False, True])
def solver(request, tmp_path_factory):
    """Return a directory with a run that learnt three problems, with a chat template or without."""
    root = tmp_path_factory.mktemp("solver")
    problems = [{"problem": f"Tom has {n} pens and buys 2.", "reasoning": [f"{n} + 2 = {n + 2}."],
                 "answer": str(n + 2)} for n in (3, 5, 9)]  # fmt: skip
    data = read_reasoning(problems)
    tokenizer = train_bpe([*data.corpus, TEMPLATE] * 3, 300, individual_digits=True)
    if request.param:
        tokenizer.chat_template = TEMPLATE
    network = library.Transformer(
        library.TransformerConfig(32, 2, 2, 64, tokenizer.vocab_size, max_seq_len=128), seed=1
    )
    cot = library.ChainOfThought(
        network, tokenizer, template=SolutionTemplate("Q: {problem}\n", "* {step}\n", "So {answer}")
    )
    cot.fit(data, max_steps=150, learning_rate=1e-2, batch_size=3)
    cot.save(root / "run" / "model")
    return root


def test_a_model_that_reasons_is_asked_problems(solver):
    problem = "Tom has 5 pens and buys 2."
    solution = library.ChainOfThought(solver / "run" / "model").solve_with_reasoning(problem)
    assert (solution.steps, solution.answer) == (("5 + 2 = 7.",), "7")
    for more in ([], ["--chat"]):
        out, _ = loopos("generate", "run", "--prompt", problem, *more, cwd=solver)
        assert out == f"{solution.text}\n" == "* 5 + 2 = 7.\nSo 7\n"
    out, _ = loopos("generate", "run/model", "--prompt", problem, "--json", cwd=solver)
    row = json.loads(out)
    assert (row["steps"], row["answer"]) == (["5 + 2 = 7."], "7")
    assert (row["prompt"], row["stop_reason"]) == (problem, "stop_token")
    several = ["--num-samples", "2", "--seed", "3", "--json"]
    out, _ = loopos("generate", "run", "--prompt", problem, *several, cwd=solver)
    warm, _ = loopos("generate", "run", "--prompt", problem, *several, "--temperature", "0.7",
                     cwd=solver)  # fmt: skip
    assert out == warm
    # A text is gone on with if that is asked for.
    text = f"Q: {problem}\n* 5 +"
    network, tokenizer = (load(solver / "run" / "model")
                          for load in (library.load_model, library.load_tokenizer))  # fmt: skip
    (found,) = generate(network, [text], tokenizer=tokenizer, temperature=0, max_new_tokens=6)
    out, _ = loopos("generate", "run", "--prompt", text, "--no-chat", "--temperature", "0",
                    "--max-new-tokens", "6", cwd=solver)  # fmt: skip
    assert out == f"{found.text}\n"


# -- chat ------------------------------------------------------------------------------------------


def test_a_conversation_goes_on(project):
    out, err = loopos("chat", "out", "--temperature", "0", cwd=project,
                      stdin="blue?\n\n/reset\nred?\n/quit\ngreen?\n")  # fmt: skip
    assert out == "It is blue 五 😀.\nIt is red 五 😀.\n"
    assert err == "a new conversation\n"


def test_each_answer_follows_from_all_that_was_said(project):
    out, _ = loopos("chat", "out", "--temperature", "0", "--system", "Be red", "--max-new-tokens",
                    "6", cwd=project, stdin="blue?\ngreen?\n")  # fmt: skip
    tokenizer = library.load_tokenizer(project / "out" / "model")
    model, template = library.load_model(project / "out" / "model"), ChatTemplate(tokenizer)
    messages = [{"role": "system", "content": "Be red"}]
    expected = []
    for text in ("blue?", "green?"):
        messages.append({"role": "user", "content": text})
        (found,) = generate(
            model, [template.prompt(messages)], tokenizer=tokenizer, temperature=0,
            max_new_tokens=6, stop_ids=template.stop_ids,
        )  # fmt: skip
        messages.append({"role": "assistant", "content": found.text})
        expected.append(f"{found.text}\n")
    assert out == "".join(expected)


def test_a_full_context_is_said_and_not_the_end(project):
    full = ("the conversation fills the 96 tokens that the model can take; "
            "/reset begins a new one")  # fmt: skip
    out, err = loopos("chat", "out", "--temperature", "0", cwd=project,
                      stdin=f"{'red ' * 99}\n/reset\nblue?\n")  # fmt: skip
    assert out == f"{ANSWER}\n"
    assert err.splitlines() == [full, "a new conversation"]


def test_commands_of_a_conversation(project):
    out, err = loopos("chat", "out", cwd=project, stdin="/help\n/rest\n")
    assert out == ""
    assert err.splitlines() == [
        "/reset   begin anew",
        "/quit    leave, as Ctrl-D does",
        "/help    show these commands",
        "unknown command '/rest'; did you mean '/reset'? (known: /reset, /quit, /help)",
    ]


def test_a_model_without_template_cannot_chat(project):
    assert refused("chat", "plain", cwd=project, stdin="a\n") == (
        "plain: the model has no chat template, so it cannot chat; "
        "'loopos generate plain --no-chat' goes on with a text"
    )
    assert "not UTF-8" in refused_bytes("chat", "out", cwd=project, stdin=b"\xff\n")


def refused_bytes(*arguments, cwd, stdin):
    done = subprocess.run([LOOPOS, *arguments], cwd=cwd, env=ENVIRONMENT, input=stdin,
                          capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 2
    return done.stderr.decode()


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments, cwd):
        import pty

        self._main, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [LOOPOS, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT | {"TERM": "dumb"},
            stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            # Where the tests run in the background Ctrl-C is ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(terminal)
        self.shown = ""

    def type(self, text):
        os.write(self._main, text.encode())

    def read(self, seconds=60):
        """Take what is there, or comes."""
        ready, _, _ = select.select([self._main], [], [], seconds)
        if not ready:
            self.process.kill()
            raise AssertionError(f"nothing comes after {self.shown!r}")
        self.shown += os.read(self._main, 4096).decode(errors="ignore")

    def wait_for(self, text):
        while text not in self.shown:
            self.read()
        before, _, self.shown = self.shown.partition(text)
        return before

    def leave(self):
        """Return the exit code."""
        try:
            while True:
                self.read()
        except OSError:  # the other side is closed
            pass
        os.close(self._main)
        return self.process.wait(timeout=60)


@pytest.mark.skipif(os.name != "posix", reason="needs pseudo-terminals")
def test_on_a_terminal_answers_stream_and_can_be_stopped(project, tmp_path):
    terminal = Terminal("chat", "out", "--temperature", "0", cwd=project)
    terminal.wait_for("> ")
    terminal.type("blue?\n")
    assert ANSWER in terminal.wait_for("> ")
    time.sleep(0.5)  # a signal before readline waits for keys is seen at the next key only
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("Ctrl-D or /quit leaves")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.leave() == 0


@pytest.mark.skipif(os.name != "posix", reason="needs pseudo-terminals")
def test_an_answer_is_stopped_and_the_program_goes_on(project, tmp_path):
    tokenizer = library.load_tokenizer(project / "base")
    config = library.TransformerConfig(
        d_model=256, num_heads=4, num_layers=8, d_ff=1024, vocab_size=tokenizer.vocab_size,
        max_seq_len=8192,
    )  # fmt: skip
    library.Transformer(config, seed=0).save(tmp_path / "slow", tokenizer)
    terminal = Terminal("chat", tmp_path / "slow", "--max-new-tokens", "8000", cwd=project)
    terminal.wait_for("> ")
    terminal.type("go\n")
    terminal.wait_for("go")
    while len(terminal.shown) < 20:  # some of the answer is there
        terminal.read()
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("stopped")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.leave() == 0


@pytest.mark.skipif(os.name != "posix", reason="needs pseudo-terminals")
def test_one_prompt_streams_on_a_terminal(project):
    terminal = Terminal("generate", "out", "--prompt", "red?", "--temperature", "0", cwd=project)
    assert terminal.leave() == 0
    first, speed = terminal.shown.replace("\r", "").splitlines()
    assert first == "It is red 五 😀."
    assert re.fullmatch(SPEED, f"{speed}\n")
