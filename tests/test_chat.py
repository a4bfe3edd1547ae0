"""Chat templates: the text is transformers', and exactly what the assistant says is trained on."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopos.data.chat import ChatTemplate
from loopos.data.solutions import SolutionTemplate, SolutionWriter
from loopos.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from loopos.errors import ConfigError, DataError, ModelFormatError

FIXTURES = Path(__file__).parent / "fixtures" / "chat_templates"
MARKS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>",
         "<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>",
         "<|user|>", "<|assistant|>", "<|system|>"]  # fmt: skip
#: Of each template the tokens it asks for, what closes a turn, and whether it strips texts.
KINDS = {
    "chatml": ("<|im_start|>", "<|im_end|>", "<|im_end|>", False),
    "qwen": ("<|im_start|>", "<|im_end|>", "<|im_end|>", False),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", True),
    "mistral": ("<s>", "</s>", "</s>", False),
    "gemma": ("<bos>", "</s>", "<end_of_turn>", True),
    "zephyr": ("<s>", "</s>", "</s>", False),
}
TURNS = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5, 五 😀."},
    {"role": "user", "content": "\n  und  weiter?\n"},
    {"role": "assistant", "content": "\nJa:\n\n- é ñ\n"},
]
SYSTEM = {"role": "system", "content": "Be short. [/INST]"}
CORPUS = ["What is 2 + 3? It is 5. \n\n user assistant system model [INST] [/INST] ]] \n \n"] * 3


def backend():
    found = train_bpe(CORPUS, 330)._backend
    found.add_special_tokens(MARKS)
    return found


def tokenizer(kind="chatml"):
    bos, eos, _, _ = KINDS.get(kind, KINDS["chatml"])
    found = Tokenizer(backend(), eos, {"bos_token": {"content": bos}, "eos_token": eos})
    found.chat_template = (FIXTURES / f"{kind}.jinja").read_text(encoding="utf-8")
    return found


TEMPLATES = {kind: ChatTemplate(tokenizer(kind)) for kind in KINDS}


def said(messages, kind):
    """Return the texts of the assistant, each closed as the template closes it."""
    _, _, end, strips = KINDS[kind]
    texts = [m["content"] for m in messages if m["role"] == "assistant"]
    return "".join((text.strip() if strips else text) + end for text in texts)


def message_of(kind, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the text is that of transformers --------------------------------------------------------------


def theirs(kind):
    transformers = pytest.importorskip("transformers")
    bos, eos, _, _ = KINDS.get(kind, KINDS["chatml"])
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token=bos, eos_token=eos
    )
    found.chat_template = (FIXTURES / f"{kind}.jinja").read_text(encoding="utf-8")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_ids_are_those_of_transformers(kind):
    other, own = theirs(kind), TEMPLATES[kind]
    conversations = [TURNS[:n] for n in (1, 2, 3, 4)]
    if kind not in ("mistral", "gemma"):
        conversations += [[SYSTEM, *TURNS[:n]] for n in (1, 3, 4)]
    for messages in conversations:
        for prompt in (False, True):
            text = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert own.render(messages, add_generation_prompt=prompt) == text
        ids = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert own.prompt(messages).tolist() == ids


def test_tools_and_thoughts_are_those_of_transformers():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
    messages = [
        TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "tool", "content": "4"},
        TURNS[1],
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    for given_tools in (None, tools):
        text = theirs("qwen").apply_chat_template(messages, tools=given_tools, tokenize=False)
        assert TEMPLATES["qwen"].render(messages, tools=given_tools) == text
    thought = [TURNS[0], TURNS[1] | {"thinking": "hm"}]
    text = theirs("thinking").apply_chat_template(thought, tokenize=False)
    assert "<think>\nhm\n</think>" in text
    assert ChatTemplate(tokenizer("thinking")).render(thought) == text


def test_a_call_of_a_tool_is_trained_on_and_its_answer_is_not():
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        TURNS[1],
    ]
    own = TEMPLATES["qwen"]
    ids, trained = own.encode(messages)
    assert own.tokenizer.decode(ids[trained]) == (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
        "It is 5, 五 😀.<|im_end|>"
    )


# -- what is trained on ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_what_the_assistant_says_is_trained_on(kind):
    own = TEMPLATES[kind]
    ids, trained = own.encode(TURNS)
    assert (ids.dtype, trained.dtype) == (np.int32, bool)
    assert own.tokenizer.decode(ids) == own.render(TURNS)
    assert own.tokenizer.decode(ids[trained]) == said(TURNS, kind)
    _, last = own.encode(TURNS, train_on="last_assistant")
    assert own.tokenizer.decode(ids[last]) == said(TURNS[2:], kind)
    _, later = own.encode(TURNS, first=2)
    assert own.tokenizer.decode(ids[later]) == said(TURNS[2:], kind)
    every, everything = own.encode(TURNS, train_on="all")
    assert everything.all()
    assert own.tokenizer.decode(every) == own.render(TURNS)
    assert own.stop_ids == (own.tokenizer.token_to_id(KINDS[kind][2]),)


#: Texts without the marks themselves, which are tokens wherever they stand.
TEXT = st.text(min_size=1, max_size=12).filter(
    lambda text: text.strip() and not any(mark in text for mark in MARKS)
)


@given(st.sampled_from(sorted(KINDS)), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_any_text_is_trained_on_exactly(kind, exchanges):
    own = TEMPLATES[kind]
    messages = [
        {"role": role, "content": text}
        for exchange in exchanges
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]
    ids, trained = own.encode(messages)
    assert own.tokenizer.decode(ids) == own.render(messages)
    assert own.tokenizer.decode(ids[trained]) == said(messages, kind)
    # Before its first word the model sees what it is prompted with when it generates.
    prompt = own.prompt(messages[:1])
    assert ids[: prompt.size].tolist() == prompt.tolist()
    assert not trained[: prompt.size].any()
    assert trained[prompt.size]


def test_a_token_across_the_edge_is_cut():
    own = TEMPLATES["mistral"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "]] b"}]
    whole, _ = own.tokenizer.encode_with_offsets(own.render(messages))
    ids, trained = own.encode(messages)
    assert ids.tolist() != whole.tolist()
    assert own.tokenizer.decode(ids[trained]) == "]] b</s>"
    assert ids[: own.prompt(messages[:1]).size].tolist() == own.prompt(messages[:1]).tolist()


@pytest.mark.parametrize("answer", ["hello world", "5"])
@pytest.mark.parametrize("trimmed", [True, False])
def test_spaces_before_a_token_are_its_own_whatever_its_offsets_say(trimmed, answer):
    from tokenizers import processors

    text = "user hello there ASSISTANT: hello world yes no"
    found = train_bpe([text * 5, " hello world 1 2 3"] * 5, 320, individual_digits=True)
    found._backend.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    found._backend.add_special_tokens(["<|im_end|>"])
    found.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}\n{% else %}"
        "ASSISTANT: {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    own = ChatTemplate(found)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    ids, trained = own.encode(messages)
    prompt = own.prompt(messages[:1])
    assert ids[: prompt.size].tolist() == prompt.tolist()
    assert found.decode(ids[trained]) == f"{answer}<|im_end|>"


def test_special_tokens_are_not_added_again():
    from tokenizers import processors

    found = tokenizer("llama3")
    mark = found.token_to_id("<|begin_of_text|>")
    found._backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", mark)]
    )
    ids, _ = ChatTemplate(found).encode(TURNS)
    assert ids.tolist().count(mark) == 1
    assert found.encode("a")[0] == mark


# -- what does not fit -----------------------------------------------------------------------------


def test_a_tokenizer_without_template_says_what_to_set():
    found = Tokenizer(backend())
    assert message_of(ConfigError, ChatTemplate, found) == (
        "the tokenizer has no chat template: write one to chat_template.jinja in the directory "
        "that data.tokenizer or data.pretrained_weights names ('loopos tokenizer train' makes such "
        "a directory), or set tokenizer.chat_template in Python"
    )


def test_what_a_template_refuses_is_said():
    expected = "the chat template refuses this: Only user and assistant roles are supported!"
    own = TEMPLATES["mistral"]
    two = [TURNS[0], TURNS[0]]
    assert "must alternate" in message_of(DataError, own.encode, two)
    messages = [*TURNS[:2], TURNS[0], {"role": "tool", "content": "3"}]
    assert message_of(DataError, own.encode, messages) == expected
    assert "System role not supported" in message_of(
        DataError, TEMPLATES["gemma"].render, [SYSTEM, *TURNS]
    )
    found = tokenizer()
    found.chat_template = "{{ messages.__class__ }}"
    assert message_of(DataError, ChatTemplate(found).prompt, TURNS) == (
        "the chat template writes nothing of these messages"
    )
    found.chat_template = "{{ messages[0].content.x.y }}"
    assert message_of(ModelFormatError, ChatTemplate(found).encode, TURNS) == (
        "the chat template fails: 'str object' has no attribute 'x'"
    )


def test_a_turn_that_changes_when_others_follow_is_named():
    own = ChatTemplate(tokenizer("thinking"))
    expected = (
        "message 2: the chat template writes it in another way when it is followed by others or "
        "answers a prompt, so that its tokens cannot be told; train_on 'last_assistant' may do"
    )
    assert message_of(DataError, own.encode, TURNS) == expected
    ids, trained = own.encode(TURNS, train_on="last_assistant")
    assert own.tokenizer.decode(ids[trained]) == (
        f"<think>\n\n</think>\n\n{TURNS[3]['content']}<|im_end|>"
    )


#: DeepSeek-R1-Distill's way: an answer is prompted with a thought that history does not show.
PROMPTED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def test_a_turn_is_closed_alike_whatever_an_answer_is_prompted_with():
    found = tokenizer()
    found.chat_template = PROMPTED
    own = ChatTemplate(found)
    end = found.token_to_id("<|im_end|>")
    assert own.stop_ids == (end,)
    assert SolutionWriter(found, SolutionTemplate()).stop_ids == (end,)
    # What is trained on cannot be told there.
    assert "its tokens cannot be told" in message_of(DataError, own.encode, TURNS[:2])
    found.chat_template = PROMPTED.replace("<|im_end|>", "")
    assert ChatTemplate(found).stop_ids == ()


def test_offsets_are_places_in_the_text():
    found = tokenizer()
    text = "It is <|im_end|>五 😀"
    ids, offsets = found.encode_with_offsets(text)
    mark = ids.tolist().index(found.token_to_id("<|im_end|>"))
    assert text[slice(*offsets[mark])] == "<|im_end|>"
    assert offsets[-1, 1] == len(text)
    assert found.added_ids >= {found.token_to_id(mark) for mark in MARKS}
    assert found.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    ids, offsets = found.encode_with_offsets("")
    assert (ids.shape, offsets.shape) == ((0,), (0, 2))
    assert "half a surrogate" in message_of(DataError, found.encode_with_offsets, "\ud800")


def test_a_template_is_kept_with_the_tokenizer(tmp_path):
    found = tokenizer("llama3")
    found.save(tmp_path)
    again = ChatTemplate(load_tokenizer(tmp_path))
    assert again.render(TURNS) == TEMPLATES["llama3"].render(TURNS)
