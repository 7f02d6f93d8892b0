"""Finds the code in a chat answer; returns "" for a text that is no such answer.

A chat model answers with thoughts, prose, drafts, commands and usage around the function that
it was asked for. Any model may close a fence after its code and then explain the code. A text
with neither fences nor prose is a completion, which this module leaves alone. The answer is:

- only what follows the thoughts (`</think>`), if there are any;
- if the text begins with code, the code before the first fence or sentence, with the function's
  first definition only: no text gets a second try for being wrong;
- else the last complete block that defines the function and is not offered as an alternative,
  with the imports, helpers and constants that it names from other blocks;
- else a block that holds the function's body alone;
- else, without fences, the code between the prose.

The time is proportional to the text. This module raises nothing, and knows no problems or models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from keyword import iskeyword

from specsampling.method.text import SEPARATORS
from specsampling.tasks.statements import (
    RETURNS,
    defines,
    definition_of,
    indent_of,
    is_definition,
    logical_lines,
    names,
    needed,
    statements,
    without_strings,
    words,
)

MAX_CHARACTERS = 100_000  # after the thoughts, in which code is looked for
INDENT = "    "

_THOUGHTS_END = re.compile(
    r"</(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|analysis|seed:think)>"
    r"|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>"
)
TURN_ENDS = (
    *("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|end|>", "<|return|>", "<|assistant|>", "<|user|>", "<|system|>", "<｜end▁of▁sentence｜>"),
    *("</s>", "<end_of_turn>", "<start_of_turn>", "<eos>"),
)
# People write <filename> and [PREFIX] too, so these do not end an answer.
_ANSWER_ENDS = (*TURN_ENDS, *(name for name in SEPARATORS if re.search(r"[|｜]|fim|_sep", name)))
_END_OF_TEXT = re.compile("|".join(map(re.escape, _ANSWER_ENDS)))
_CODE_TAG = re.compile(
    r"^[ \t]*(?:\[/?(?:PYTHON|BEGIN|DONE|CODE)\]|</?(?:code|answer|solution|python)>)[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
_LANGUAGE = re.compile(r"\A\s*python3?[ \t]*\n", re.IGNORECASE)  # a name that lost its fence
_FENCE = re.compile(
    r"(?P<before>.*?)(?P<fence>(?<!`)`{3,}(?!`)|(?<!~)~{3,}(?!~))[ \t]*(?P<info>[^`]*)$"
)
_BULLET = re.compile(r"[ \t]*(?:(?:[-*+>]|\d{1,3}[.)])[ \t]+)*$")  # a list's or a quotation's
_INFO = re.compile(
    r"(?:[\w.+#-]+|\{[^}]*\})(?: code)?(?:[ \t]+(?:\{.*|\[.*|[\w-]+=.*|\S+\.py))?[ \t]*$"
)
_PYTHON = re.compile(r"[{.]*(?:ipython|python|pycon|py)3?", re.IGNORECASE)
_ALTERNATIVE = re.compile(
    r"\balternativ|\banother (?:way|approach|option|solution|version|method)\b", re.IGNORECASE
)
_QUOTED = re.compile(r"[ \t]*> ?")
_PROMPT = re.compile(r"[ \t]*(?:>>>|\.\.\.) ?(.*)")
_INDENTED = re.compile(r"(?:\s*\n)?[ \t]+\S")
_RETURNS = re.compile(r"\b(?:return|yield|raise)\b")
_CODE = re.compile(
    r"(?:async\s+def|def|class|import|from\s+[\w.]+\s+import)\b|@\w"
    r"|(?:if|for|while|with|try|else|elif|except|finally|match)\b.*:(?:\s*\w|\s*$)"
    r"|(?:return|yield|raise|assert|del|global|nonlocal)\b(?! (?:the|a|an|that)\b)"
    r"|(?:pass|break|continue)$"
    r"|[\w.]+(?:\[.*\])?(?:\s*,\s*[\w.]+)*\s*(?::[^=]+)?(?:[-+*/%&|^@]|//|\*\*|<<|>>)?=(?!=)"
    r"|[\w.]+\(.*\)$|0$",
    re.DOTALL,
)
_MARKUP = re.compile(r"(?:(?:[-*+>•]|\d{1,3}[.)])[ \t]+)*(?=\*\*[^\W\d]|[^\W\d])")
_PAIR = re.compile(r"(?<![^\s(])([A-Za-z][a-z]*) ([a-z]+)\b")  # two words
_SENTENCE = re.compile(
    r"\*\*|[^\x00-\x7f]"  # bold; another script
    r"|(?:[A-Z][a-z]*|[a-z]{3,})['’](?:s|t|re|ve|ll|d|m)\b"  # here's
    r"|[A-Z][a-z]*[!:]$|[A-Z][\w'’,\"`-]* [\w'’ ,\"`-]*[.!?:]$"  # a class may end in a dot
    r"|[a-z][a-z',-]*(?: [a-z',-]+){2,}[.!?:]$"
)
_MAX_HEAD = 200  # characters of a line that decide whether it is a statement


@dataclass(frozen=True)
class Block:
    """The text between two fences, or between a fence and the answer's end."""

    text: str  # without shared indentation
    is_python: bool  # the opening fence names Python, or no language
    is_whole: bool  # closed, with a body, and not offered as an alternative


def code_in(answer: str, entry_point: str) -> str:
    """Return the code of an answer with fences or prose; "" for a text without them.

    The code defines `entry_point` at the margin, or else may be the function's body, indented.
    """
    text, is_answer = final_part(answer)
    lines = text.split("\n")
    opening = next((line for line in lines if line.strip() and line.lstrip()[0] != "#"), "")
    fence = _FENCE.match(opening)
    is_text = is_prose(opening) or (fence and _BULLET.match(fence["before"]))
    if _starts_code(opening) and not is_text:
        front, is_ended = _in_front(lines)
        if not (is_ended or is_answer):
            return ""
        if code := _first_try(front, entry_point):
            return code
    if blocks := fenced_blocks(text):
        return _chosen(blocks, entry_point)
    return _unfenced(text, entry_point) if is_answer or is_prose(opening) else ""


def _in_front(lines: Sequence[str]) -> tuple[str, bool]:
    """Return the code that a text begins with, and whether a fence or a sentence ends it."""
    front, number, is_closed = _inside(lines, 0, "```")
    for line in logical_lines(front):
        if not line.indent and is_prose(front[line.first]):
            return "\n".join(front[: line.first]), True
    return "\n".join(front), is_closed or number < len(lines)


def _first_try(code: str, entry_point: str) -> str:
    """Return the function's body or definition, with the code up to another definition of it."""
    is_indented = bool(_INDENTED.match(code))
    tries = [found.start() for found in definition_of(entry_point).finditer(code)]
    if not (is_indented or tries or _is_body(code)):
        return ""
    others = tries if is_indented else tries[1:]
    code = code[: min(others, default=None)]
    return code if tries and not is_indented else as_body(code)


def _chosen(blocks: Sequence[Block], entry_point: str) -> str:
    """Return the code of the block that is the answer; "" if no block holds Python."""
    defining = [block for block in reversed(blocks) if defines(block.text, entry_point)]
    if defining:
        chosen = next((block for block in defining if block.is_whole), defining[0])
        return _with_needed(chosen, blocks, entry_point)
    code = [block.text for block in blocks if block.is_python and block.text.strip()]
    bodies = [text for text in code if _is_body(text)]
    return as_body(bodies[-1]) if bodies else next(iter(code), "")


def is_prose(line: str) -> bool:
    """Tell whether a line is surely a sentence or a heading, and not just broken code."""
    text = line.strip()[:_MAX_HEAD]
    head = without_strings(text)[0]
    start = _MARKUP.match(text)
    if start is None or _is_code(head):
        return False
    text = text[start.end() :]
    if _SENTENCE.match(text):
        return True
    pairs = _PAIR.finditer(head[start.end() :])
    return text[0].isupper() and any(not any(map(iskeyword, pair.groups())) for pair in pairs)


def final_part(answer: str) -> tuple[str, bool]:
    """Return the text from the end of an answer's thoughts to the end of its turn, with plain
    newlines, and whether other text came before."""
    text = answer.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\ufeff", "").replace("\u00a0", " ")
    last = _THOUGHTS_END.split(text)[-1]
    text, is_end = (last, last != text) if last.strip() else (text, False)
    text = next((part for part in _END_OF_TEXT.split(text) if part.strip()), "")
    if len(text) > MAX_CHARACTERS:  # an answer ends with its code, a completion begins with it
        end = text[-MAX_CHARACTERS:].partition("\n")[2]
        text, is_end = (end, True) if "```" in end else (text[:MAX_CHARACTERS], is_end)
    text = _CODE_TAG.sub(lambda tag: "```" if tag[0].strip()[1] in "/Dd" else "```python", text)
    return _LANGUAGE.sub("```python\n", text), is_end


def fenced_blocks(text: str) -> list[Block]:
    """Return the blocks of an answer.

    A fence inside a triple-quoted string belongs to the code. A fence that names a language
    begins a block even if the block before has not been closed.
    """
    blocks: list[Block] = []
    introduction: list[str] = []  # the lines between two blocks
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        is_bullet = fence and _BULLET.match(fence["before"])
        if (
            fence is None
            or (fence["fence"][0] == "~" and not is_bullet)
            or (fence["info"] and not _INFO.match(fence["info"]))  # other words follow the fence
        ):
            introduction.append(lines[number])
            number += 1
            continue
        introduction.append(fence["before"])
        is_alternative = bool(_ALTERNATIVE.search("\n".join(introduction)))
        introduction = []
        inside, number, is_closed = _inside(lines, number + 1, fence["fence"], fence["before"])
        code = _at_margin(_without_prompts(inside))
        is_python = not fence["info"].strip() or bool(_PYTHON.match(fence["info"].strip()))
        is_whole = is_closed and bool(RETURNS.search(code)) and not is_alternative
        blocks.append(Block(code, is_python, is_whole))
    return blocks


def _inside(
    lines: Sequence[str], first: int, opening: str, before: str = ""
) -> tuple[list[str], int, bool]:
    """Return a block's lines, the number of the line after it, and whether it was closed.

    `opening` is the fence that began the block, and `before` is the text in front of the fence.
    """
    inside: list[str] = []
    quote, is_text = "", False  # is_text: the open string ends, so fences belong to it
    for number in range(first, len(lines)):
        line = lines[number]
        if ">" in before:
            line = _QUOTED.sub("", line)
        fence = _FENCE.match(line) if opening[0] in line else None
        if fence and fence["fence"][0] == opening[0] and not fence["before"].strip():
            is_text = is_text or (bool(quote) and _string_ends(lines, number, quote, before))
            if not is_text:
                begins_another = bool(_INFO.match(fence["info"]))
                return inside, number + (not begins_another), not begins_another
        code, after = without_strings(line, quote)
        if code.endswith(opening):  # backticks are no Python: the fence ends the code's last line
            return [*inside, line.rstrip().rstrip(opening[0])], number + 1, True
        is_text = is_text and after == quote
        quote = after
        inside.append(line)
    return inside, len(lines), False


def _string_ends(lines: Sequence[str], first: int, quote: str, before: str) -> bool:
    """Tell whether an open string ends before another block of Python begins."""
    for line in islice(lines, first, None):
        if quote in line:
            return True
        fence = _FENCE.match(line)
        if fence and _PYTHON.match(fence["info"]) and len(fence["before"]) <= len(before):
            return False
    return False


def _without_prompts(lines: Sequence[str]) -> Sequence[str]:
    """Remove the interpreter's prompts from a block, or a language's name on its first line."""
    if lines and lines[0].lstrip().startswith(">>> "):
        return [found[1] for line in lines if (found := _PROMPT.match(line))]
    return lines[1:] if lines and _PYTHON.fullmatch(lines[0].strip()) else lines


def _at_margin(lines: Sequence[str]) -> str:
    """Remove the indentation that all lines of code share.

    `textwrap.dedent` would fail where text in a string is less indented than the code.
    """
    shared = min((line.indent for line in logical_lines(lines)), default=0)
    return "\n".join(_shifted(line, -shared) if line.strip() else "" for line in lines)


def _shifted(line: str, columns: int) -> str:
    """Move a line to the right, or to the left if `columns` is negative."""
    if not columns or not line.strip():
        return line
    return " " * max(0, indent_of(line) + columns) + line.lstrip(" \t\f")


def _with_needed(chosen: Block, blocks: Sequence[Block], entry_point: str) -> str:
    """Put the definitions that the chosen block needs from other blocks in front of it."""
    own = {name for head, _ in statements(chosen.text) for name in names(head)}
    others = [
        (head, text)
        for block in blocks
        if block is not chosen and block.is_python
        for head, text in statements(block.text)
        if not names(head) & own and entry_point not in words(text)
    ]
    stay = needed(chosen.text, dict(enumerate(others)))
    return "\n".join([*(others[at][1] for at in sorted(stay)), chosen.text])


def _unfenced(text: str, entry_point: str) -> str:
    """Return the statements of an answer without fences, without the prose around them."""
    lines = text.strip("\n").split("\n")
    set_off = [line for line in lines if indent_of(line) >= len(INDENT) or not line.strip()]
    is_program = defines(text, entry_point)
    if not is_program and defines(program := _at_margin(set_off), entry_point):
        return program  # Markdown indents code that has no fences
    starts = (at for at, line in enumerate(lines) if _starts_code(line, at_margin=is_program))
    found = enumerate(statements("\n".join(lines[next(starts, len(lines)) :])))
    code = "\n".join(whole for at, (head, whole) in found if at == 0 or _is_code(head))
    if is_program:
        return code
    return as_body(code) if _is_body(_at_margin(code.split("\n"))) else ""


def _is_code(head: str) -> bool:
    """Tell whether a line without its strings looks like a statement more than like prose."""
    return bool(_CODE.match(head if len(head) <= _MAX_HEAD else f"{head[:_MAX_HEAD]})"))


def _starts_code(line: str, at_margin: bool = False) -> bool:
    if line[:1].isspace() or not line:
        return bool(line.strip()) and not at_margin
    return _is_code(without_strings(line)[0])


def _is_body(code: str) -> bool:
    """Tell whether code returns at the margin, as a function's body does and no program can."""
    return any(_RETURNS.search(text) and not is_definition(head) for head, text in statements(code))


def as_body(code: str) -> str:
    """Indent statements as a function's body, the first as deep as its neighbours.

    A stripped answer has lost its first line's indentation, or all of it.
    """
    lines = code.strip("\n").split("\n")
    logical = logical_lines(lines)
    if not logical or logical[0].indent == len(INDENT):
        return code
    first, others = logical[0], [line.indent for line in logical[1:]]
    level = min(others, default=first.indent)
    if first.code.endswith(":") and others and others[0] == level > first.indent:
        level = first.indent  # all that follows may belong to the first statement's block
    lines[first.first] = _shifted(lines[first.first], level - first.indent)
    return "\n".join(_shifted(line, len(INDENT) - level) for line in lines)
