"""Problems and solutions as tokens: which token is what, and back from text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.data.solutions import ANSWER, PROMPT, STEPS, SolutionTemplate, SolutionWriter
from loopos.data.tokenizer import Tokenizer, train_bpe
from loopos.errors import ConfigError

CORPUS = ["Problem: Tom has 12 pens.\nReasoning:\n12 + 30 = 42.\nAnswer: 42"] * 4
TOKENIZER = train_bpe(CORPUS, 300)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: What a person may write; no surrogates, nor lines' ends, which divide steps.
line = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1).filter(
    lambda text: text.strip() == text and not text.isspace()
)
TEMPLATES = [
    SolutionTemplate(),
    SolutionTemplate("{problem}\n", "- {step}\n", "#### {answer}"),
    SolutionTemplate("Q: {problem} A:", " {step}\n\n", "The answer is {answer}!"),
]


def chat_tokenizer():
    from tokenizers import AddedToken

    tokenizer = train_bpe(CORPUS, 300)
    backend = tokenizer._backend
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")]
    )
    return Tokenizer(backend, "<|im_end|>", {"chat_template": CHATML})


CHAT = chat_tokenizer()


@settings(max_examples=150, deadline=None)
@given(line, st.lists(line, min_size=1, max_size=4), line, st.sampled_from(TEMPLATES))
def test_tokens_of_each_kind_decode_to_their_part(problem, steps, answer, template):
    ids, kinds = SolutionWriter(TOKENIZER, template).solution(problem, steps, answer)
    parts = [TOKENIZER.decode(ids[kinds == kind]) for kind in (PROMPT, STEPS, ANSWER)]
    assert parts[0] == template.prompt.replace("{problem}", problem)
    assert parts[1] == template.steps_text(steps)
    assert parts[2] == template.answer_text(answer) + "<|endoftext|>"
    assert (np.diff(kinds) >= 0).all()


@settings(max_examples=80, deadline=None)
@given(line, st.lists(line, min_size=1, max_size=3), line)
def test_what_is_trained_on_continues_the_prompt_of_generation(problem, steps, answer):
    for tokenizer in (TOKENIZER, CHAT):
        writer = SolutionWriter(tokenizer, SolutionTemplate())
        ids, kinds = writer.solution(problem, steps, answer)
        prompt = writer.prompt(problem)
        assert (ids[: prompt.size] == prompt).all()
        assert (kinds[: prompt.size] == PROMPT).all()
        assert (kinds[prompt.size :] != PROMPT).all()
        assert ids[-1] == writer.stop_ids[0]
        after = writer.prompt(problem, steps)
        assert tokenizer.decode(after[prompt.size :]) == writer.template.steps_text(steps)


def test_a_problem_may_be_a_turn_of_a_chat():
    writer = SolutionWriter(CHAT, SolutionTemplate("{problem}", "{step}\n", "#### {answer}"))
    ids, kinds = writer.solution("2 + 3?", ["2 + 3 = 5."], "5")
    assert CHAT.decode(ids[kinds == PROMPT]) == (
        "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert CHAT.decode(ids[kinds == ANSWER]) == "#### 5<|im_end|>"
    plain = SolutionWriter(CHAT, SolutionTemplate(), chat=False)
    assert CHAT.decode(plain.prompt("x")) == "Problem: x\nReasoning:\n"
    with pytest.raises(ConfigError, match="chat_template"):
        SolutionWriter(TOKENIZER, SolutionTemplate(), chat=True)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["1 + 2 = 3.", "So: 4!", "Ünï 5"]), min_size=1), st.sampled_from("357")
)
def test_text_is_read_back(steps, answer):
    for template in TEMPLATES[:2]:
        text = template.steps_text(steps) + template.answer_text(answer)
        assert template.parse(text) == (tuple(steps), answer)


@pytest.mark.parametrize(
    "template",
    [
        SolutionTemplate(step="<s> {step} </s>\n", answer="<answer>{answer}</answer>"),
        SolutionTemplate(step="* {step};\n\n", answer="\\boxed{{answer}}\nDone."),
        SolutionTemplate(answer="The answer is {answer}."),
        SolutionTemplate(step="Step\n{step}\n", answer="So: {answer} .\n"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("answer", ["4.5", "1,200", "a pear"])
def test_what_stands_behind_steps_and_answer_is_no_part_of_them(template, answer):
    steps = ("1 + 2 = 3", "3.0 + 1.5 = 4.5")
    text = template.steps_text(steps) + template.answer_text(answer)
    found, given = template.parse(text)
    assert tuple(step for step in found if step != "Step") == steps
    assert given == answer


def test_text_without_a_mark_has_steps_alone():
    assert SolutionTemplate().parse("1 + 2 = 3\n\n 3 + 4 = 7") == (("1 + 2 = 3", "3 + 4 = 7"), None)
    assert SolutionTemplate().parse("Answer:") == ((), None)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"prompt": "Problem"}, r"prompt_template: expected \{problem\} once, found it 0 times"),
        ({"prompt": "{problem}{problem}"}, "found it 2 times"),
        ({"prompt": "{problme}"}, r"found \{problme\}; did you mean 'problem'"),
        ({"step": "{step}"}, "step_template: expected a line's end"),
        ({"answer": "{answer}"}, "answer_template: expected a mark"),
    ],
)
def test_templates_that_do_not_work(texts, message):
    with pytest.raises(ConfigError, match=message):
        SolutionTemplate(**texts)
