"""Answers: what a text gives, one form for votes, exact comparison; no input is too much."""

# ruff: noqa: RUF001 - signs that look alike are what these tests are about

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loopos.data.answers import extract_answer, normal_answer, same_answer
from loopos.errors import DataError

LONG = "1" * 100_000
FORMS = {
    "5": "5", "5.": "5", "5.00": "5", ".5": "0.5", "007": "7", "+5": "5", "-0.0": "0", "−7": "-7",
    "５": "5", "$1,200.50": "1200.5", "1,234,567": "1234567", "1{,}234": "1234",
    "1\u202f234": "1234",
    "-$5": "-5", "$-5": "-5", "$5$": "5", "$.50": "0.5", "5 €": "5", "5$": "5", "= 5": "5",
    "**5**": "5", "5 apples.": "5", "1 1/2 hours": "1.5", "-1 1/2": "-1.5", "1 and 1/2": "1.5",
    "3/4": "0.75", "3 / 4": "0.75", "2/6": "1/3", "-2/6": "-1/3", "½": "0.5", "3½": "3.5",
    "⅔": "2/3", r"\frac{3}{4}": "0.75", r"1\frac{1}{2}": "1.5", r"\text{5 cm}": "5",
    "1e3": "1000", "1.5E-2": "0.015", "1.5 x 10^3": "1500", r"2 \times 10^{-1}": "0.2",
    "0.1": "0.1", "0.333": "0.333", "1e-20": "0." + "0" * 19 + "1", "1e-21": "1/1" + "0" * 21,
    "50%": "50", "50 percent": "50", "5 million": "5000000", "$2.5 billion": "2500000000",
    "5 km/h": "5", "5 m²": "5", "12 a.m.": "12", "5 slices of pizza": "5", "$5 per hour": "5",
    "the 5": "5", "a 5": "5", "x = 5": "5", "n=-1/2": "-0.5", "$x = 5$ cm": "$x = 5$ cm",
    r"\frac12": "0.5", r"-\frac12": "-0.5", r"\frac1{72}": "1/72", r"\dfrac{7}2": "3.5",
    r"2\frac34": "2.75", r"90^\circ": "90", r"$90^{\circ}$": "90",
    # Text.
    "The Apple": "apple", "an  apple!": "apple", "a the cat": "cat", "A": "a", "(B)": "b",
    "B)": "b",
    "vitamin A": "vitamin a", "twenty-one": "twenty one", "It's": "its", "STRASSE": "strasse",
    "Straße": "strasse", "": "", "...": "", "-": "-", "$": "$", "10:30": "10:30", "3:4": "3:4",
    "(1, 2)": "(1,2)", "1, 3, 5": "1,3,5", "(0, 5]": "(0,5]", "x = 1, 2": "x = 1,2",
    "1, 200": "1, 200", "(1,200)": "(1, 200)", "1,200, 3": "1200,3", "1,200,3": "1, 200,3",
    "(1,000, 2,000)": "(1000,2000)", "1, 1/2": "1,1/2", "May 5, 2021": "may 5 2021",
    "5-6": "5-6", "5 and 6": "5 and 6", "3,5": "3,5", "1,23": "1,23", "1,2,3": "1,2,3",
    "x = y": "x = y", "xy = 5": "xy = 5", "x = x = 5": "x = x = 5", r"5^\circle": "5^ circle",
    "3x": "3x", "3 x": "3 x", "5 feet 6 inches": "5 feet 6 inches",
    "3/0": "3/0", "1 2/0": "1 2/0", "0/0": "0/0", "5²": "5^2", "1e999999": "1e999999",
    "1e-999999": "1e-999999", "1e999999999999": "1e999999999999", "nan": "nan", "inf": "inf",
    "10^999999": "10^999999", LONG: LONG, "-" + LONG: "-" + LONG, "0." + LONG: "0." + LONG,
    LONG + "/3": LONG + "/3", "1e" + LONG: "1e" + LONG, "__import__('os')": "__import__(os)",
}  # fmt: skip
SAME = [
    ("5 apples", "5"), ("5", "5 pears"), ("5 apple", "5 apples"), ("5 boxes", "5 box"),
    ("5 berries", "5 berry"), ("5 children", "5 child"), ("6 in", "6 inches"), ("6 feet", "6 ft."),
    ("5 km", "5 kilometres"), ("5 hrs", "5 hours"), ("5 m^2", "5 m²"), ("5 km/h", "5 kmh"),
    ("5 kilometers per hour", "5 km / h"), ("60 mph", "60 miles per hour"), ("$5", "5 dollars"),
    ("$5", "5 bucks"), ("$5 per hour", "5 dollars/hour"), ("£5", "5 pounds"), ("5 lbs", "5 pounds"),
    ("50%", "50"), ("50 %", "50 percent"), ("7 pm", "7 P.M."), ("0.5", "1/2"), ("1.50", "1 1/2"),
    ("1e2", "100"), ("3/0", "3/0"), ("1e999999", "1E999999"), (LONG, LONG), ("The cat", "cat."),
    ("5 apples left", "5 apples in total"), ("5 of the apples", "5 apples"),
    ("(1, 2)", "(1,2)"), ("1, 3, 5", "1,3,5"), ("(0, 5]", "(0,5]"), ("-1, 2", "-1,2"),
    ("90^\\circ", "90 degrees"), ("x = 5 cm", "5 cm"), ("x = 5", "5 apples"), ("X=5", "x = 5"),
    ("1,200, 3", "1200, 3"), ("1, 200", "1 , 200"), ("(1, 200)", "(1,200)"), ("1,200", "1200"),
]  # fmt: skip
DIFFERENT = [
    ("5 apples", "5 pears"), ("1 km", "1000 m"), ("$5", "5 cents"), ("50%", "0.5"), ("50%", "$50"),
    ("7 am", "7 pm"), ("0.1", "0.10000000000000001"), ("1/3", "0.3333333333333333"), ("3/0", "3"),
    ("1e999999", "1e999998"), (LONG, LONG + "1"), ("cat", "dog"), ("5", "five"), ("5", ""),
    ("x = 5", "y = 5"), ("x = 5 cm", "5 m"),
    ("3x", "3"), ("10:30", "1030"), ("1,2", "12"), ("-5", "5"), ("5-6", "5"), ("a", ""),
    ("1, 200", "1200"), ("1, 1/2", "1.5"), ("1, 3, 5", "135"), ("(1, 2)", "(2, 1)"),
]  # fmt: skip
FOUND = {
    "6 * 7 = 42\n#### 42\n": "42", "#### 1\n#### 2": "2", "#### -3 apples \nmore 7": "-3 apples",
    "Answer: 3\nAnswer: 4 apples\n9": "4 apples", "**Answer:** 7": "7", "ANSWER : yes": "yes",
    "So the answer is 5. I am sure of 9.": "5", "The final answer is: $1.50.": "$1.50",
    r"so \boxed{\frac{1}{2}} or \boxed{x_{1}+2}.": "x_{1}+2", r"\boxed{5": "5",
    "#### \nAnswer: 8": "8", "Answer:\n5": "5", "12 - 7 = 5.": "5", "10-3": "3", "x=-5": "-5",
    "it is -5 degrees": "-5", "1,234, and 1,234,567, so": "1,234,567",
    "costs $1,200.50.": "$1,200.50",
    "3 1/2 cups": "3 1/2", "1½ cups": "1½", "about 10%": "10%", "1.5e3 m": "1.5e3", "v2.": "2",
    "Final Answer: The final answer is $5$. I hope it is correct.": "$5$",
    "Answer: The answer is 42.": "42", r"#### \boxed{7}": "7", r"The answer is \boxed{5}.": "5",
    "Answer: the answer is": "the answer is", "Answer: all of the above": "all of the above",
    "none": None, "": None, "Answer:": None,
}  # fmt: skip


def shown(value):
    return str(value)[:20]


@pytest.mark.parametrize(("text", "form"), FORMS.items(), ids=shown)
def test_forms(text, form):
    assert normal_answer(text) == form


@pytest.mark.parametrize(("a", "b"), SAME, ids=shown)
def test_same(a, b):
    assert same_answer(a, b)
    assert same_answer(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT, ids=shown)
def test_different(a, b):
    assert not same_answer(a, b)
    assert not same_answer(b, a)


@pytest.mark.parametrize(("text", "found"), FOUND.items(), ids=shown)
def test_found_without_a_marker(text, found):
    assert extract_answer(text) == found


def test_found_behind_a_marker():
    assert extract_answer("Answer: 3\nanswer: 4 \r\n5", "Answer:") == "4"
    assert extract_answer("Result> x\nResult>", "Result>") is None
    assert extract_answer("the answer is 5", "####") is None
    assert extract_answer("Answer: The answer is 42.", "Answer:") == "42"
    assert extract_answer("a.b c 7 a+b 8", "a.b c") == "7 a+b 8"
    with pytest.raises(DataError, match=r"^the marker of an answer is empty$"):
        extract_answer("5", "")
    for function in (normal_answer, extract_answer):
        with pytest.raises(DataError, match=r"^expected an answer as text, found int$"):
            function(5)
    with pytest.raises(DataError, match=r"^expected an answer as text, found NoneType$"):
        same_answer("5", None)


@pytest.mark.parametrize(
    "piece", ["1", ",111", "1,", "1 ", "1/", "-", "1e", "½", "²", "{", "\\frac{", "\\boxed{",
              "####", "answer", "the answer is", "a ", "$", "1.", "*", "per ", "km/"],
)  # fmt: skip
def test_any_length_is_read_in_linear_time(piece):
    text = "5" + piece * 50_000  # quadratic work on this would take minutes
    assert normal_answer(normal_answer(text)) == normal_answer(text)
    assert same_answer(text, text)
    extract_answer(text)


def test_the_largest_numbers():
    assert normal_answer("1e599") == "1" + "0" * 599
    assert normal_answer("1e600") == "1e600"
    assert normal_answer("9" * 600) == "9" * 600
    assert same_answer("1e-599", "1/1" + "0" * 599)
    assert normal_answer("1 million" * 1000) != "1000000"


numbers = st.fractions() | st.decimals(allow_nan=False, allow_infinity=False, places=6).map(
    Fraction
)
alphabet = st.sampled_from("0123456789.,/-+ $%eExX*^=½²·aAbtheknm()[]{}\\'\n:") | st.characters()
texts = st.text(alphabet, max_size=30)


@given(numbers)
def test_a_number_is_its_own_form_however_it_is_written(value):
    form = normal_answer(f"{value.numerator}/{value.denominator}")
    assert Fraction(form) == value
    assert normal_answer(form) == form
    whole, rest = divmod(abs(value), 1)
    sign = "-" if value < 0 else ""
    mixed = f"{sign}{whole:,} {rest.numerator}/{rest.denominator}"
    assert normal_answer(mixed) == form
    assert same_answer(f"{mixed} hours", f"{form} hrs")
    assert extract_answer(f"So that is {form}.") == form


@given(texts)
@example("the the 5")
@example("a$b$")
@example("ŉ")
def test_the_form_of_a_form_is_itself(text):
    form = normal_answer(text)
    assert normal_answer(form) == form
    assert same_answer(text, form)
    assert same_answer(text, text)
    found = extract_answer(text)
    assert found is None or (found == found.strip() and found in text)


@given(texts, texts)
def test_comparison_is_symmetric_and_follows_the_form(a, b):
    assert same_answer(a, b) == same_answer(b, a)
    if same_answer(a, b):
        assert normal_answer(a) == normal_answer(b)
