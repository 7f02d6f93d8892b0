"""A chat template on a given day: what it prints of the clock is the run's, not the day's."""

from datetime import datetime

import pytest
from conftest import make_tokenizer
from transformers.utils import chat_template_utils

from specsampling.models.errors import ModelError
from specsampling.models.tokenizer import encode_chat

START = datetime(2026, 3, 31, 23, 59, 58)
LATER = datetime(2027, 11, 9, 8, 5, 1)
MESSAGES = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

# A published template's way of saying the day, or a neighbour's -> what it says at START.
DAYS = {
    # Llama 3.2 and 3.3
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}'
    '{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}'
    "Today Date: {{ date_string }}": "Today Date: 31 Mar 2026",
    # Llama 3.1, whose day is a constant
    '{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "Today Date: {{ date_string }}": "Today Date: 26 Jul 2024",
    # Granite 3
    "Today's Date: {{ strftime_now('%B %d, %Y') }}.": "Today's Date: March 31, 2026.",
    # gpt-oss
    '{{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n" }}': "Current date: 2026-03-31\n",
    # SmolLM3
    '{%- set today = strftime_now("%d %B %Y") -%}Today Date: {{ today ~ "\\n" }}': (
        "Today Date: 31 March 2026\n"
    ),
    "{{ strftime_now('%H:%M:%S') }}": "23:59:58",
    "{{ strftime_now('%I %p, %A %a %j %U %w') }}": "11 PM, Tuesday Tue 090 13 2",
    "{{ strftime_now('%Y')|int + 1 }}": "2027",
    "{{ strftime_now('%s') | length }}": "10",
    "{{ strftime_now('%f%Z%z%%') }}": "000000%",
    "{{ strftime_now('') }}.": ".",
    "{%- macro day(how) %}{{ strftime_now(how) }}{% endmacro %}{{ day('%d') }}": "31",
    "{% for how in ['%d', '%m'] %}{{ strftime_now(how) }}.{% endfor %}": "31.03.",
    "{%- set ns = namespace(day=strftime_now('%d')) %}{{ ns.day }}": "31",
    "{{ now is defined }} {{ datetime is defined }}": "False False",
}


class Clock(datetime):
    """A clock that stands at LATER."""

    @classmethod
    def now(cls, tz=None):
        return LATER


@pytest.fixture
def later(monkeypatch):
    """transformers' clock, another day than START."""
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.fixture
def ask():
    """Text of a message in a template."""
    made = make_tokenizer()

    def text_of(template: str, now: datetime | None) -> str:
        made.chat_template = template + MESSAGES
        return made.decode(encode_chat(made, "hi", now))

    return text_of


@pytest.mark.parametrize("template", DAYS, ids=DAYS.get)
def test_a_template_sees_the_time_that_it_is_given(template, ask, later):
    """Templates that print the day gave a run that takes two days two prompts for one example."""
    assert ask(template, START) == f"{DAYS[template]}user: hi\n"
    made = make_tokenizer()
    made.chat_template = template + MESSAGES
    expected = made.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert ask(template, LATER) == expected  # at the clock's time: as transformers renders it


def test_without_a_time_it_is_the_clocks(ask):
    before = datetime.now()
    day = ask("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}|", None).partition("|")[0]
    assert before <= datetime.fromisoformat(day) <= datetime.now()


def test_the_clock_goes_on_behind_a_template_even_one_that_fails(ask, later):
    ask("{{ strftime_now('%Y') }}", START)
    assert chat_template_utils.datetime is Clock
    for template in ("{{ raise_exception('no') }}", "{{ now() }}", "{{ strftime_now(3) }}"):
        with pytest.raises(ModelError, match="the chat template of .* fails"):
            ask(template, START)
        assert chat_template_utils.datetime is Clock
