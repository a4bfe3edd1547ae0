"""Templates of strangers: they write what transformers' would, and can do nothing else."""

import pytest

from loopos.data.templates import Template
from loopos.errors import DataError, ModelFormatError

MESSAGES = [{"role": "user", "content": "Hi 😀"}, {"role": "assistant", "content": "Yes"}]
EACH = "{% for m in messages %}"


def message_of(kind, source, **variables):
    with pytest.raises(kind) as caught:
        Template(source).render(messages=MESSAGES, **variables)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].content }}{{ nothing }}", "Hi 😀"),
        (EACH + "\n    {% if true %}\nx{{ loop.length }}{% endif %}\n{% endfor %}", "x2x2"),
        (EACH + "{{ m.role }}{% if loop.last %}!{% endif %}{% endfor %}", "userassistant!"),
        ("{% for m in messages if m.role == 'user' %}{{ loop.last }}{% endfor %}", "True"),
        (
            EACH + "{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
            "assistant",
        ),
        (EACH + "{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}", "a1"),
        (
            "{% for i in [1, [2, 3]] recursive %}{{ i if i is number else loop(i) }}{% endfor %}",
            "123",
        ),
        (
            "{% set n = namespace(k=0) %}" + EACH + "{% set n.k = n.k + 1 %}{% endfor %}{{ n.k }}",
            "2",
        ),
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ messages | map(attribute='role') | join(',') }}", "user,assistant"),
        ("{% generation %}{{ 'a' * 3 }}{% endgeneration %}", "aaa"),
        ("{{ dict(a=2)['a'] }}{{ '%s-%d' % ('x', 2) }}{{ 2 ** 10 }}", "2x-21024"),
        ("{{ messages[0].content.replace('Hi', 'Ho').split(' ')[0] }}", "Ho"),
        ("{{ '**%s** 1234567 %d%%' % ('a', 12345678) }}", "**a** 1234567 12345678%"),
        ("{{ '**{}** {:>3}'.format(12345678, 'a') }}", "**12345678**   a"),
        ("{{ 12345678 | string }}{{ 12345678 | tojson }}{{ [1, 2] | sum }}", "12345678123456783"),
        ("{%- macro f(x) -%}<{{ x }}>{%- endmacro -%}{{ f(1) }}", "<1>"),
        ("{{ strftime_now('%%') }}{{ '  a ' | trim }}", "%a"),
    ],
)
def test_what_templates_do(source, expected):
    assert Template(source).render(messages=MESSAGES) == expected


LONG = "it makes a text or list that is too long"
WIDE = "it formats a text to a width that is too large"
STEPS = "it takes more than 1,000,000 steps"
NUMBER = "it gives a function a number that is too large"
NAME = "a namespace has no attribute '__class__'"
UNSAFE = "access to attribute '{}' of '{}' object is unsafe."
LOOP = "{% for i in range(99999) %}"
TWICE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
DOUBLE = (
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s OP n.s %}{% endfor %}"
)
NEST = (
    "{% set n = namespace(x=['a']) %}{% for i in range(60) %}"
    "{% set n.x = MADE %}{% endfor %}{{ SHOWN }}"
)
LINE = "{% set s = 'a' * 99999 %}"
BIG = "{% set s = 'a' * 4000000 %}" + LOOP


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", UNSAFE.format("__class__", "str")),
        ("{{ cycler.__init__.__globals__ }}", UNSAFE.format("__init__", "type")),
        ("{{ messages.append(1) }}", UNSAFE.format("append", "list")),
        ("{{ namespace(__class__=3) }}", NAME),
        ("{% set n = namespace() %}{% set n.__class__ = 3 %}", NAME),
        (f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}", STEPS),
        (TWICE, STEPS),
        (LOOP + "{{ 'a' * 100000 }}{% endfor %}", "it writes a text that is too long"),
        ("{{ 'a' * 10**10 }}", LONG),
        ("{{ 10**10 * [0] }}", LONG),
        (DOUBLE.replace("OP", "~"), LONG),
        (DOUBLE.replace("OP", "+"), LONG),
        (
            "{% set n = namespace(s=0) %}"
            + LOOP
            + "{% set n.s = [n.s, 'a' * 99999] %}{% endfor %}",
            STEPS,
        ),
        (LINE + "{{ s | replace('a', s) }}", LONG),
        (LINE + "{{ s.replace('a', s) }}", LONG),
        (LINE + "{{ ([s] * 9999) | join }}", LONG),
        ("{{ '%1000000000d' % 1 }}", WIDE),
        ("{{ '%1000000000d' | format(1) }}", WIDE),
        ("{{ '{:>1000000000}'.format(1) }}", WIDE),
        ("{{ '%*d' | format(1000000000, 1) }}", WIDE),
        ("{{ '%-5.*f' % (1000000000, 1) }}", WIDE),
        ("{{ '%(a)1000000d' % {'a': 1} }}", WIDE),
        ("{{ '{:{}}'.format(1, 1000000000) }}", WIDE),
        (LINE + "{{ ([s] * 9999) | select | join }}", LONG),
        (LINE + "{{ ''.join([s] * 9999) }}", LONG),
        ("{{ [[1] * 9999, [1]] | sum(start=[]) }}", LONG),
        ("{{ [1] | tojson(indent=1000000000) }}", NUMBER),
        ("{{ 'a' | center(1000000000) }}", NUMBER),
        ("{{ 'a'.ljust(1000000000) }}", NUMBER),
        (NEST.replace("MADE", "[n.x, n.x]").replace("SHOWN", "n.x"), LONG),
        (NEST.replace("MADE", "(n.x, n.x)").replace("SHOWN", "{n.x: 1} | length"), LONG),
        (NEST.replace("MADE", "{'a': n.x, 'b': n.x}").replace("SHOWN", "n.x | tojson"), LONG),
        (NEST.replace("MADE", "dict(a=n.x, b=n.x)").replace("SHOWN", "n.x ~ ''"), LONG),
        (NEST.replace("MADE", "(n.x * 2) | batch(2) | list").replace("SHOWN", "n.x"), LONG),
        (NEST.replace("MADE", "{'a': [n.x, {1: n.x}.items()]}").replace("SHOWN", "n.x"), LONG),
        (
            "{% macro f(s, n) %}{{ f(s ~ s, n - 1) if n else s }}{% endmacro %}{{ f('a', 60) }}",
            LONG,
        ),
        (BIG + "{{ s.startswith('b') }}{% endfor %}", STEPS),
        (BIG + "{% set t = s[1:] %}{% endfor %}", STEPS),
        (BIG + "{{ 'b' in s }}{% endfor %}", STEPS),
        (BIG + "{{ s is upper }}{% endfor %}", STEPS),
        ("{{ '%(a%b)1000000d' % {'a%b': 1} }}", WIDE),
        ("{{ 9 ** 99999 }}", "it makes a number that is too large"),
    ],
)
def test_attacks_end_in_a_sentence(source, message):
    assert message_of(ModelFormatError, source) == f"the chat template is not safe: {message}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[9].x.y }}", " fails: list object has no element 9"),
        ("{{ 1 / 0 }}", " fails: division by zero"),
        ("{{ nothing.x }}", " fails: 'nothing' is undefined"),
        ("{{ 'a' + 1 }}", ' fails: can only concatenate str (not "int") to str'),
        ("{% include '/etc/passwd' %}", " fails: no loader for this environment specified"),
        ("{{ lipsum() }}", " fails: 'lipsum' is undefined"),
        (
            "\n{{ a b }}",
            ": line 2 cannot be read (expected token 'end of print statement', got 'b')",
        ),
        ("{{ 1 | loopos }}", ": line 1 cannot be read (No filter named 'loopos'.)"),
    ],
)
def test_faults_end_in_a_sentence(source, message):
    assert message_of(ModelFormatError, source) == f"the chat template{message}"


@pytest.mark.parametrize(
    "source", ["{{ ('{' ~ ':' * 4000000).format(1) }}", "{{ ('%(' * 2000000) % 1 }}"]
)
def test_formats_are_looked_at_in_no_time(source):
    """In proportion to their length: to its square would be hours."""
    message_of(ModelFormatError, source)


def test_namespaces_that_hold_each_other_are_not_written_out():
    source = (
        "{% set n = namespace(x=1) %}{% for i in range(60) %}"
        "{% set m = namespace(a=n.x, b=n.x) %}{% set n.x = m %}{% endfor %}{{ n.x }}"
    )
    assert Template(source).render(messages=[]) == "<Namespace>"


def test_what_a_template_refuses_is_said():
    found = message_of(DataError, "{{ raise_exception('roles\n must alternate') }}")
    assert found == "the chat template refuses this: roles must alternate"
    long = message_of(DataError, "{{ raise_exception('x' * 9999) }}")
    assert long.endswith("xxx...")


def test_each_rendering_counts_anew():
    template = Template("{% for i in range(90000) %}{% endfor %}a")
    assert {template.render(messages=[]) for _ in range(20)} == {"a"}
