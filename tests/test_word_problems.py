"""Word problems: every step is right, train and test never meet, the end is told."""

import importlib.util
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.data.problems import LEVELS, SKILLS, check_answer, make_problems, verify
from loopos.errors import ConfigError, DataError
from loopos.files import builtin

NUMBERS = re.compile(r"\d+")


def calculations(problem):
    """What is calculated, summands and factors in order of size."""
    found = []
    for step in problem["reasoning"]:
        [(a, op, b)] = re.findall(r"(\d+) ([-+*/]) (\d+) =", step)
        pair = sorted((int(a), int(b))) if op in "+*" else [int(a), int(b)]
        found.append((op, *pair))
    return tuple(found)


def test_a_problem_as_it_is_told():
    problems = make_problems(3, seed=1, levels=[2], skills=["sharing", "money"])
    assert problems == GOLDEN
    assert problems == make_problems(4, seed=1, levels=(2,), skills=("sharing", "money"))[:3]
    assert problems != make_problems(3, seed=2, levels=[2], skills=["sharing", "money"])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**40),
    st.sets(st.sampled_from(sorted(LEVELS)), min_size=1).map(sorted),
    st.sets(st.sampled_from(list(SKILLS)), min_size=1).map(sorted),
    st.sampled_from(["train", "test"]),
)
def test_every_step_is_right_and_within_its_level(seed, levels, skills, split):
    problems = make_problems(10, seed=seed, levels=levels, skills=skills, split=split)
    assert len({(p["skill"], calculations(p)) for p in problems}) == 10
    for problem in problems:
        verify(problem)
        assert list(problem) == ["problem", "reasoning", "answer", "skill", "level"]
        assert problem["level"] in levels
        assert problem["skill"] in skills
        limits = LEVELS[problem["level"]]
        assert limits.steps[0] <= len(problem["reasoning"]) <= limits.steps[1]
        text = " ".join([problem["problem"], *problem["reasoning"]])
        assert all(2 <= int(n) <= limits.largest for n in NUMBERS.findall(text))
        # Each number that is told is needed: nothing is there to distract.
        used = {n for step in problem["reasoning"] for n in NUMBERS.findall(step)}
        assert set(NUMBERS.findall(problem["problem"])) <= used
        steps = "\n".join(problem["reasoning"])
        assert check_answer(problem, f"{steps}\nAnswer: {problem['answer']} dollars")
        assert check_answer(problem, f"{steps}\n#### {problem['answer']}.00")
        assert not check_answer(problem, f"{steps}\nAnswer: {int(problem['answer']) + 1}")
        assert not check_answer(problem, "")


def test_no_calculation_of_a_test_is_ever_one_of_training():
    parts = {
        split: {
            calculations(problem)
            for seed, levels in ((1, (1, 2, 3)), (2, (1,)), (3, (2,)))
            for problem in make_problems(size, seed=seed, levels=levels, split=split)
        }
        for split, size in (("train", 6000), ("test", 1000))
    }
    assert len(parts["train"]) > 10_000
    assert len(parts["test"]) > 2000
    assert not parts["train"] & parts["test"]


def test_all_levels_and_skills_have_their_share():
    problems = make_problems(1800, seed=4)
    kinds = [(p["level"], p["skill"]) for p in problems]
    counts = {(level, skill): kinds.count((level, skill)) for level in LEVELS for skill in SKILLS}
    assert min(counts.values()) > 60
    assert max(counts.values()) < 140
    assert {len(p["reasoning"]) for p in problems if p["level"] == 3} == {4, 5}
    operators = {op for p in problems for op, _, _ in calculations(p)}
    assert operators == set("+-*/")
    assert len({p["problem"] for p in problems}) == 1800


def test_a_space_that_is_used_up_ends_with_one_sentence():
    kinds = {"levels": [1], "skills": ["time"], "split": "test"}
    expected = (
        r"^there are about (\d+) different test problems of the levels 1 and skills time, "
        r"fewer than 1000$"
    )
    with pytest.raises(DataError, match=expected) as caught:
        make_problems(1000, seed=1, **kinds)
    found = int(NUMBERS.findall(str(caught.value))[0])
    assert 20 < found < 100
    assert len(make_problems(found - 10, seed=2, **kinds)) == found - 10
    # What is used up leaves its share to the rest.
    more = make_problems(500, seed=1, levels=[1], skills=["time", "change"], split="test")
    assert 20 < sum(p["skill"] == "time" for p in more) < 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "count: expected 0 at least, found -1"),
        ({"seed": -1}, "seed: expected 0 at least, found -1"),
        ({"levels": [1, 4]}, "levels: expected one of 1, 2, 3, found 4"),
        ({"levels": []}, "levels: expected a list of one at least, found []"),
        ({"skills": "time"}, "skills: expected a list of one at least, found 'time'"),
        (
            {"skills": ["mony"]},
            "skills: expected one of change, groups, comparison, sharing, money, time, "
            "found 'mony'; did you mean 'money'?",
        ),
        (
            {"split": "tests"},
            "split: expected one of train, test, found 'tests'; did you mean 'test'?",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ConfigError) as caught:
        make_problems(**{"count": 1, "seed": 0} | arguments)
    assert str(caught.value) == message


def test_no_problems():
    assert make_problems(0, seed=0) == []


@pytest.mark.parametrize(
    ("reasoning", "answer", "message"),
    [
        (["Tom has 12 + 7 = 18 apples."], "18", "step 1 is wrong: 'Tom has 12 + 7 = 18 apples.'"),
        (["12 + 7 = 19", "19 / 5 = 3"], "3", "step 2 is wrong: '19 / 5 = 3'"),
        (["12 / 0 = 0"], "0", "step 1 is wrong: '12 / 0 = 0'"),
        (["Tom has 19."], "19", "step 1: expected one calculation, found 'Tom has 19.'"),
        (
            ["12 + 7 = 19 and 19 - 5 = 14"],
            "14",
            "step 1: expected one calculation, found '12 + 7 = 19 and 19 - 5 = 14'",
        ),
        (["12 + 8 = 20"], "20", "step 1: 8 comes from nowhere in '12 + 8 = 20'"),
        (["12 + 7 = 19"], "12", "the answer is '12', but the steps give 19"),
        ([], "12", "the answer is '12', but the steps give None"),
    ],
)
def test_what_is_wrong_is_found(reasoning, answer, message):
    problem = {
        "problem": "Tom has 12 apples, 7 more, gives away 5, and 0.",
        "reasoning": reasoning,
        "answer": answer,
    }
    with pytest.raises(DataError) as caught:
        verify(problem)
    assert str(caught.value) == message


GOLDEN = [
    {
        "problem": "Eva buys 7 nuts for 6 dollars each. Eva buys a lamp for 10 dollars. "
        "Eva buys a cake for 4 dollars. How many dollars does Eva pay?",
        "reasoning": [
            "The nuts cost 7 * 6 = 42 dollars.",
            "Then it costs 42 + 10 = 52 dollars.",
            "Then it costs 52 + 4 = 56 dollars.",
        ],
        "answer": "56",
        "skill": "money",
        "level": 2,
    },
    {
        "problem": "Ida buys 8 nuts for 7 dollars each. A coupon takes 8 dollars off. "
        "Ida buys a map for 11 dollars. How many dollars does Ida pay?",
        "reasoning": [
            "The nuts cost 8 * 7 = 56 dollars.",
            "Then it costs 56 - 8 = 48 dollars.",
            "Then it costs 48 + 11 = 59 dollars.",
        ],
        "answer": "59",
        "skill": "money",
        "level": 2,
    },
    {
        "problem": "Eva has 26 eggs. Eva loses 12 eggs. Eva shares all eggs equally "
        "among 7 children. Sam is one of the children. Sam buys 7 more eggs. "
        "How many eggs does Sam have now?",
        "reasoning": [
            "Eva has 26 - 12 = 14 eggs.",
            "Each child gets 14 / 7 = 2 eggs.",
            "Sam has 2 + 7 = 9 eggs.",
        ],
        "answer": "9",
        "skill": "sharing",
        "level": 2,
    },
]


def test_shipped_problems_are_those_of_their_tool():
    path = Path(__file__).parents[1] / "tools" / "make_problems.py"
    spec = importlib.util.spec_from_file_location("make_problems_tool", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name, count, split in tool.FILES:
        assert builtin(name).read_text(encoding="utf-8") == tool.text_of(count, split)
