"""Preference data: what rows may look like, what is left out and counted, and what is refused."""

import json

import numpy as np
import pytest

from loopos.data.preferences import plain_chat, read_judgements, read_preferences
from loopos.data.readers import split
from loopos.data.responses import PreferenceReport, encode_responses
from loopos.data.tokenizer import Tokenizer, train_bpe
from loopos.errors import ConfigError, DataError

ROWS = [
    {"prompt": "Say a:", "chosen": " a b", "rejected": " b"},
    {"prompt": "Say a:", "chosen": " a", "rejected": " c c c"},
    {"prompt": "Say b:", "chosen": " b", "rejected": " c"},
    {"prompt": "Say c:", "chosen": " c", "rejected": " a b"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([text for row in ROWS for text in row.values()], 270)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write rows as p.jsonl."""
    monkeypatch.chdir(tmp_path)

    def write(rows):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "p.jsonl"

    return write


def refused(function, *arguments):
    with pytest.raises(DataError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- reading ---------------------------------------------------------------------------------------


def test_pairs_are_read_with_their_places(written):
    data = read_preferences(written(ROWS))
    assert list(data.texts) == [row["prompt"] for row in ROWS]
    assert list(data.chosen) == [row["chosen"] for row in ROWS]
    assert list(data.rejected) == [row["rejected"] for row in ROWS]
    assert list(data.where) == [f"p.jsonl:{i}" for i in range(1, 5)]
    assert data.margins is None
    assert sorted(data.corpus) == sorted(text for row in ROWS for text in row.values())
    taken = data.take([3, 0])
    assert (list(taken.chosen), list(taken.where)) == ([" c", " a b"], ["p.jsonl:4", "p.jsonl:1"])


def test_margins_belong_to_every_row_or_none():
    rows = [row | {"margin": margin} for row, margin in zip(ROWS, (1, "0.5", 0, -2.5), strict=True)]
    data = read_preferences(rows)
    assert data.margins.tolist() == [1.0, 0.5, 0.0, -2.5]
    assert data.take([3, 1]).margins.tolist() == [-2.5, 0.5]
    assert refused(read_preferences, [*rows, ROWS[0]]) == (
        "row 5: has no 'margin', unlike the rows before"
    )
    assert refused(read_preferences, [ROWS[0], rows[1]]) == (
        "row 2: has a 'margin', unlike the rows before"
    )
    for wrong in ("much", True, float("nan")):
        assert refused(read_preferences, [ROWS[0] | {"margin": wrong}]) == (
            f"row 1: expected 'margin' to be a finite number, found {wrong!r}"
        )


def test_margins_and_responses_are_what_makes_two_sets_the_same():
    plain = read_preferences(ROWS)
    others = [
        read_preferences([row | {"margin": 1} for row in ROWS]),
        read_preferences([row | {"rejected": row["rejected"] + "x"} for row in ROWS]),
        plain.take([1, 0, 2, 3]),
    ]
    parts = ["".join(data.parts()) for data in (plain, *others)]
    assert len(set(parts)) == 4
    assert "".join(read_preferences(ROWS).parts()) == parts[0]


def test_ties_and_rows_without_a_prompt_are_left_out_and_counted(written, tokenizer):
    rows = [
        *ROWS,
        {"prompt": "Say d:", "chosen": " d", "rejected": " d"},
        ROWS[0] | {"score_chosen": 3, "score_rejected": 3.0},
        ROWS[0] | {"score_chosen": 4, "score_rejected": 3},
        ROWS[0] | {"prompt": "  "},
    ]
    data = read_preferences(written(rows))
    assert len(data.texts) == 5
    assert list(data.ties) == ["p.jsonl:5", "p.jsonl:6"]
    assert list(data.dropped) == ["p.jsonl:8"]
    training, validation = split(data, 0.3, 0)
    encoded = [encode_responses(tokenizer, part, 64) for part in (training, validation)]
    report = PreferenceReport.of(training, validation, *encoded, 64)
    assert (report.rows, report.validation_rows) == (len(training.texts), len(validation.texts))
    assert report.ties.count == 2
    assert report.ties.places == ["p.jsonl:5", "p.jsonl:6"]
    lines = report.lines()
    assert any(line.startswith("ties") and "p.jsonl:5, :6" in line for line in lines)
    # The longest row counts both responses, the limit one of them: the report says so.
    assert any(line.endswith(" of a prompt with all its responses") for line in lines)
    assert json.loads(json.dumps(report.to_dict()))["ties"]["places"][0] == "p.jsonl:5"


def test_equal_prompts_stay_on_one_side():
    data = read_preferences(ROWS * 5)
    for seed in range(5):
        training, validation = split(data, 0.4, seed)
        assert not set(training.texts) & set(validation.texts)
        assert len(training.texts) + len(validation.texts) == 20
        assert len(training.chosen) == len(training.texts) == len(training.rejected)


USER, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
GO = {"role": "assistant", "content": "Go"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [HELLO], "rejected": [GO]},
        {"messages": [USER], "chosen": [HELLO], "rejected": [GO]},
        {"chosen": [USER, HELLO], "rejected": [USER, GO]},
        {"prompt": "Hi", "chosen": [HELLO], "rejected": [GO]},
        {"prompt": [USER], "chosen": "Hello", "rejected": "Go"},
    ],
)
def test_conversations_are_lines_of_roles_without_a_template(row):
    data = read_preferences([row])
    assert data.texts[0] == "user: Hi\nassistant:"
    assert (data.chosen[0], data.rejected[0]) == (" Hello", " Go")


def render(messages, *, add_generation_prompt=False):
    body = "".join(f"<{m['role']}>{m['content']}</>\n" for m in messages)
    return body + ("<assistant>" if add_generation_prompt else "")


def test_conversations_are_written_as_asked():
    row = {"chosen": [USER, GO, USER, HELLO], "rejected": [USER, GO, USER, GO]}
    plain = read_preferences([row, ROWS[0]])
    data = plain.take([1, 0]).written(render)
    assert data.texts[1] == "<user>Hi</>\n<assistant>Go</>\n<user>Hi</>\n<assistant>"
    assert (data.chosen[1], data.rejected[1]) == ("Hello</>\n", "Go</>\n")
    assert (data.texts[0], data.chosen[0]) == ("Say a:", " a b")
    assert plain_chat([USER, HELLO]) == "user: Hi\nassistant: Hello"
    single = read_judgements([row]).written(render)
    assert list(single.completions) == ["Hello</>\n", "Go</>\n"]
    untouched = read_preferences(ROWS)
    assert untouched.written(render) is untouched
    wrong = refused(plain.written, lambda messages, **_: "a" * (9 - len(messages)))
    assert wrong == "row 1: the template writes an answer not as a continuation of its prompt"


def test_a_template_has_special_tokens_of_its_own(tokenizer):
    data = read_preferences([{"prompt": [USER], "chosen": [HELLO], "rejected": [GO]}, ROWS[0]])
    encoded = encode_responses(tokenizer, data, 64, render=render)
    begin = tokenizer.encode("<user>Hi</>\n<assistant>")
    assert encoded.tokens[0].tolist() == [*begin, *tokenizer.encode("Hello</>")]
    assert encoded.tokens[3].tolist()[-1] == tokenizer.eos_id  # a row of texts
    plain = encode_responses(tokenizer, data, 64)
    assert tokenizer.decode(plain.tokens[0][:-1]) == "user: Hi\nassistant: Hello"
    assert plain.tokens[0][-1] == tokenizer.eos_id


def test_a_template_is_never_passed_over(tokenizer):
    other = train_bpe([text for row in ROWS for text in row.values()], 270)
    other.chat_template = "{{ messages }}"
    data = read_preferences([{"prompt": [USER], "chosen": [HELLO], "rejected": [GO]}])
    with pytest.raises(ConfigError, match="the tokenizer has a chat template"):
        encode_responses(other, data, 64)
    assert len(encode_responses(other, data, 64, render=render).rows) == 1
    assert len(encode_responses(other, read_preferences(ROWS), 64).rows) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected' (found: prompt, chosen)"),
        ({"prompts": "a", "chosen": "b", "rejected": "c"},
         "no field 'prompt'; did you mean 'prompts'? (found: prompts, chosen, rejected)"),
        ({"prompt": 7, "chosen": "b", "rejected": "c"},
         "expected 'prompt' to be text or a list of messages, found 7"),
        ({"prompt": [], "chosen": "b", "rejected": "c"},
         "expected 'prompt' to be text or a list of messages, found no messages"),
        ({"prompt": [USER], "chosen": [USER], "rejected": "c"},
         "'chosen' begins with a message of the user, expected the assistant"),
        ({"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"},
         "message 1 of 'prompt': expected 'role' and 'content', both text, "
         "found {'role': 'user'}"),
        ({"prompt": [USER | {"extra": b"x"}], "chosen": "b", "rejected": "c"},
         "a message holds what JSON cannot: Object of type bytes is not JSON serializable"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": 2},
         "'score_chosen' 1 is below 'score_rejected' 2"),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "c"},
         "'chosen' has half a surrogate pair, so no text"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_refused_with_its_place(row, message):
    assert refused(read_preferences, [ROWS[0], row]) == f"row 2: {message}"


def test_sets_without_a_pair_are_refused(written):
    assert refused(read_preferences, []) == "the data: there is no row in it"
    tie = {"prompt": "a", "chosen": "b", "rejected": "b"}
    assert refused(read_preferences, written([tie])) == (
        "p.jsonl: no row has a prompt and two different responses"
    )


def test_judgements_are_single_or_pairs_taken_apart(written):
    rows = [
        {"prompt": "a", "completion": " b", "label": True},
        {"prompt": "a", "completion": " c", "label": "false"},
        {"prompt": [USER], "completion": [HELLO], "label": 1},
        ROWS[0],
        {"prompt": " ", "completion": " c", "label": False},
    ]
    data = read_judgements(written(rows))
    assert list(data.texts) == ["a", "a", "user: Hi\nassistant:", "Say a:", "Say a:"]
    assert list(data.completions) == [" b", " c", " Hello", " a b", " b"]
    assert data.desirable.tolist() == [True, False, True, True, False]
    assert list(data.dropped) == ["p.jsonl:5"]
    assert data.take([4, 1]).desirable.tolist() == [False, False]
    wrong = {"prompt": "a", "completion": "b", "label": "good"}
    assert refused(read_judgements, written([wrong])) == (
        "p.jsonl:1: expected 'label' to be true or false, found 'good'"
    )


# -- encoding --------------------------------------------------------------------------------------


def test_a_response_follows_its_prompt_and_is_closed(tokenizer):
    encoded = encode_responses(tokenizer, read_preferences(ROWS), 64)
    assert (encoded.per_sample, len(encoded.tokens)) == (2, 8)
    for row, text in enumerate(ROWS):
        for side, name in enumerate(("chosen", "rejected")):
            place = 2 * row + side
            begin = encoded.prompts[place]
            ids = encoded.tokens[place].tolist()
            assert ids[:begin] == tokenizer.encode(text["prompt"])
            assert ids[begin:] == [*tokenizer.encode(text[name]), tokenizer.eos_id]
    both = [len(encoded.tokens[2 * i]) + len(encoded.tokens[2 * i + 1]) for i in range(4)]
    assert encoded.lengths.tolist() == both


def test_tokens_that_a_tokenizer_adds_stand_where_they_belong():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors

    words = {"a": 0, "b": 1, "<s>": 2, "</s>": 3, "?": 4}
    backend = Backend(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    row = {"prompt": "a a", "chosen": "b", "rejected": "a b"}
    encoded = encode_responses(Tokenizer(backend, "</s>"), read_preferences([row]), 9)
    assert [ids.tolist() for ids in encoded.tokens] == [[2, 0, 0, 1, 3], [2, 0, 0, 0, 1, 3]]


def test_batches_hold_both_responses_and_mark_their_tokens(tokenizer):
    encoded = encode_responses(tokenizer, read_preferences(ROWS), 64)
    batch = encoded.batch(np.array([2, 0]), np.array([5, 6], np.int32))
    assert batch.labels.tolist() == [4, 5, 0, 1]
    assert batch.sample_ids.tolist() == [10, 11, 12, 13]
    for number, place in enumerate(batch.labels):
        begin, end = batch.offsets[number : number + 2]
        np.testing.assert_array_equal(batch.tokens[begin:end], encoded.tokens[place])
        assert batch.loss_mask[begin:end].sum() == encoded.response_lengths[place]
        assert batch.loss_mask[end - 1]
    assert not batch.loss_mask[0]


def test_pairs_without_a_preference_are_no_judgements(tokenizer):
    pair = {"prompt": "Ask", "chosen": " a", "rejected": " b"}
    tied = [pair | {"rejected": " a"}, pair | {"score_chosen": 2, "score_rejected": 2.0}]
    data = read_judgements([tied[0], pair, tied[1]])
    assert list(data.completions) == [" a", " b"]
    assert list(data.ties) == ["row 1", "row 3"]
    encoded = encode_responses(tokenizer, data, 64)
    assert PreferenceReport.of(data, None, encoded, None, 64).ties.count == 2
    with pytest.raises(DataError, match="no row has a prompt and two different responses"):
        read_judgements(tied)
    with pytest.raises(DataError, match="'score_chosen' 1 is below 'score_rejected' 2"):
        read_judgements([pair | {"score_chosen": 1, "score_rejected": 2}])


def test_a_response_is_moved_to_another_prompt(tokenizer):
    """As the KL that KTO starts from wants it: both responses of a pair have one prompt."""
    pairs = [{"prompt": p, "chosen": f" {p}", "rejected": f" not {p}"} for p in ("Ask", "Tell")]
    for rows, others in (
        (pairs, [2, 2, 0, 0]),
        ([*pairs, pairs[0]], [2, 2, 4, 4, 2, 2]),
        (pairs[:1], [1, 0]),
    ):
        encoded = encode_responses(tokenizer, read_judgements(rows), 64)
        moved = encoded.mismatched(64)
        for place, other in enumerate(others):
            prompt = encoded.tokens[place][: encoded.prompts[place]]
            response = encoded.tokens[other][encoded.prompts[other] :]
            assert moved.tokens[place].tolist() == [*prompt, *response]
        assert [len(ids) for ids in encoded.mismatched(3).tokens] == [3] * len(others)


def test_rows_that_are_too_long_are_left_out_or_refused(tokenizer):
    data = read_preferences(ROWS)
    lengths = encode_responses(tokenizer, data, 64).tokens.lengths.reshape(-1, 2).max(axis=1)
    limit = int(lengths.max()) - 1
    encoded = encode_responses(tokenizer, data, limit)
    assert encoded.too_long.tolist() == np.flatnonzero(lengths > limit).tolist()
    assert encoded.rows.tolist() == np.flatnonzero(lengths <= limit).tolist()
    report = PreferenceReport.of(data, None, encoded, None, limit)
    assert report.too_long.places == [data.where[i] for i in encoded.too_long]
    assert any("are left out" in warning for warning in report.warnings)
    row = int(encoded.too_long[0])
    assert refused(encode_responses, tokenizer, data, limit, "error") == (
        f"row {row + 1}: prompt and response have {lengths[row]} tokens, expected {limit} at most"
    )
    assert refused(encode_responses, tokenizer, data, 2) == "every row is longer than 2 tokens"


def test_what_was_encoded_is_kept_for_the_same_question_only(tokenizer):
    data = read_preferences(ROWS)
    first = encode_responses(tokenizer, data, 64)
    assert encode_responses(tokenizer, data, 64) is first
    assert encode_responses(tokenizer, data, 63) is not first
    other = train_bpe(["abc"], 260)
    assert encode_responses(other, data, 64) is not first
    assert encode_responses(other, data, 64).tokens[0].tolist() != first.tokens[0].tolist()


def test_a_repeated_prompt_is_no_duplicate_and_a_shared_one_is_a_leak(tokenizer):
    training, validation = read_preferences([*ROWS, ROWS[2]]), read_preferences(ROWS[:1])
    encoded = [encode_responses(tokenizer, data, 64) for data in (training, validation)]
    report = PreferenceReport.of(training, validation, *encoded, 64)
    assert report.duplicates.places == ["row 5"]
    assert report.leaks.count == 1
    assert report.tokens == encoded[0].lengths.sum()
