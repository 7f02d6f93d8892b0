#!/usr/bin/env bash
# transformers 5.23.0 hands a function to a chat template as the text "<function>".
#
# Keyword arguments of apply_chat_template are variables of the template. Templates with a date call
# `strftime_now`, so a caller who wants a fixed date would pass a function of that name. The template
# gets a string in its place, and "'str' object is not callable" is raised. A number arrives as it is.
#
# Exits 0 while that is so, 1 once it has changed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cd "$work"
"$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import sys

import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
chat = [{"role": "user", "content": "a"}]


def render(template, **variables):
    tokenizer.chat_template = template
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **variables)
    except TypeError as error:
        return f"TypeError: {error}"


def fixed(form):
    return "2023"


called = render("Today is {{ strftime_now('%Y') }}", strftime_now=fixed)
shown = render("{{ date }}", date=fixed)
number = render("{{ year + 1 }}", year=2023)
print("transformers", transformers.__version__)
print("a function that is called:", called)
print("a function that is shown: ", shown)
print("a number plus 1:          ", number)
sys.exit(0 if "not callable" in called and shown == "<function>" and number == "2024" else 1)
PYTHON
