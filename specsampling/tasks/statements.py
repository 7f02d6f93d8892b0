"""Finds a program's statements at the margin, line by line, and those that a function needs.

Generated code has any shape and any size. Python's own parser is not made for that: it recurses,
fills memory, and has ended interpreters. This module never parses. It knows strings, comments,
brackets and indentation, takes time in proportion to the text, and raises nothing. It knows no
problems, answers or models.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A comment, or a string: its quote, its text, and the same quote or the line's end.
_COMMENT_OR_STRING = re.compile(r"""#.*|("{3}|'{3}|"|')(?:\\.|(?!\1)[^\\])*(\1|\\?$)""")
_DEFINITION = re.compile(r"(?:async\s+def|def|class|import|from)\b")
_AFTER_OPEN_BRACKET = re.compile(r"(?:async\s+def|def|class|import|from|if __name__)\b|@\w")
_CLAUSE = re.compile(r"(?:else|elif|except|finally)\b")
_CONSTANT = re.compile(  # its value is written out, so it cannot fail
    r"\w+(?:\.\w+)*\s*(?::[^=]+)?="
    r"(?:[\s\d.,:()\[\]{}+*/-]|True|False|None|dict|set|list|tuple|frozenset|range)+$"
)
RETURNS = re.compile(r"\b(?:return|yield|lambda)\b")


@dataclass(frozen=True)
class Line:
    """A logical line: the physical lines that brackets, strings or backslashes join."""

    first: int  # number of its first physical line, from 0
    last: int
    indent: int  # columns before its text
    code: str  # its text without comments, each string replaced by a 0


def without_strings(line: str, quote: str = "") -> tuple[str, str]:
    """Return a physical line without its comment, each string replaced by a 0.

    `quote` is the quote that is open at the line's beginning, "" for none. The quote that is open
    at its end is returned, too. A string that should have ended on its line leaves its quote in the
    code.
    """
    open_quote = ""

    def shortened(found: re.Match[str]) -> str:
        nonlocal open_quote
        begin, end = found.groups()
        if begin is None:
            return ""
        if begin == end:
            return "0"
        if len(begin) == 1 and not line.endswith("\\"):
            return f"0{begin}"
        open_quote = begin
        return "0"

    if not quote:
        return _COMMENT_OR_STRING.sub(shortened, line).strip(" \t\f"), open_quote
    code = _COMMENT_OR_STRING.sub(shortened, f"{quote}.{line}")
    return code.removeprefix("0").strip(" \t\f"), open_quote


def logical_lines(lines: Sequence[str]) -> list[Line]:
    """Return the lines of code. A definition at the margin ends a bracket left open before it."""
    groups: list[tuple[int, list[str]]] = []  # the number of its first line, and its code
    quote, depth, is_open = "", 0, False
    for number, text in enumerate(lines):
        if depth and not quote and _AFTER_OPEN_BRACKET.match(text):
            depth, is_open = 0, False
        if not is_open:
            groups.append((number, []))
        code, quote = without_strings(text, quote)
        depth = max(0, depth + _depth(code))
        is_open = bool(quote or depth or code.endswith("\\"))
        groups[-1][1].append(code)
    return [
        Line(first, first + len(pieces) - 1, indent_of(lines[first]), code)
        for first, pieces in groups
        if (code := " ".join(piece.removesuffix("\\") for piece in pieces if piece).strip())
    ]


def _depth(code: str) -> int:
    """Count how many more brackets code without strings opens than it closes."""
    return sum(map(code.count, "([{")) - sum(map(code.count, ")]}"))


def indent_of(line: str) -> int:
    """Count the columns before a line's text. A tab ends at a multiple of 8, as in Python."""
    blank = line[: len(line) - len(line.lstrip(" \t\f"))]
    return len(blank.rpartition("\f")[2].expandtabs(8))


def defines(code: str, entry_point: str) -> bool:
    """Tell whether a line at the margin defines the function, by `def` or by an assignment."""
    return bool(definition_of(entry_point).search(code))


def definition_of(entry_point: str) -> re.Pattern[str]:
    """Return a pattern that matches a definition of the function at the margin."""
    name = re.escape(entry_point)
    return re.compile(
        rf"^(?:(?:async[ \t]+)?def[ \t]+{name}\b|{name}[ \t]*(?::[^=\n]*)?=(?!=))", re.MULTILINE
    )


def cut(code: str, entry_point: str) -> str:
    """Remove the examples, the tests and the unfinished end after a program's function.

    What precedes the function stays. After it, the definitions, imports and constants that the
    function needs stay, unless they were cut off. If the function is defined several times, only
    definitions that return something stay. Code that does not define the function is unchanged.
    """
    found = statements(code)
    definition = definition_of(entry_point)
    functions = [at for at, (head, _) in enumerate(found) if definition.match(head)]
    if not functions:
        return code
    returning = [at for at in functions if _returns(*found[at])]
    front = {*range(functions[0]), *(returning or functions)}
    may_stay = {
        at: (head, text)
        for at, (head, text) in enumerate(found)
        if at > functions[0] and at not in functions
        if (is_definition(head) or _CONSTANT.match(head)) and not _is_open(text)
    }
    stay = front | needed("\n".join(found[at][1] for at in front), may_stay)
    return "\n".join(found[at][1] for at in sorted(stay))


def _returns(head: str, text: str) -> bool:
    """Tell whether a definition of the function is more than a signature."""
    return not is_definition(head) or (not _is_open(text) and bool(RETURNS.search(text)))


def _is_open(text: str) -> bool:
    """Tell whether a statement was cut off, judging by its brackets and its end."""
    code = " ".join(line.code for line in logical_lines(text.split("\n")))
    return code.endswith(":") or _depth(code) != 0


def is_definition(head: str) -> bool:
    """Tell whether a statement's first line is that of a function, a class or an import."""
    return bool(_DEFINITION.match(head))


def needed(code: str, others: Mapping[int, tuple[str, str]]) -> set[int]:
    """Return the keys of the `others` that the code needs, directly or through one another.

    Each of the others is a statement as `statements` returns it.
    """
    by_name: dict[str, set[int]] = defaultdict(set)
    for key, (head, _) in others.items():
        for name in names(head):
            by_name[name].add(key)
    found: set[int] = set()
    waiting = ["*", *words(code)]
    while waiting:
        new = by_name.pop(waiting.pop(), set()) - found
        found |= new
        waiting += [word for key in new for word in words(others[key][1])]
    return found


def words(code: str) -> set[str]:
    """Return every name in the code, and every word that looks like a name."""
    return set(re.findall(r"\w+", code))


def names(head: str) -> set[str]:
    """Return the names that a statement's first line defines; "*" stands for any name."""
    if found := re.match(r"(?:async\s+def|def|class)\s+(\w+)", head):
        return {found[1]}
    if found := re.match(r"(?:from\s+[\w.]+\s+)?import\b(.*)", head, re.DOTALL):
        parts = [part.split() for part in found[1].strip(" ()").split(",")]
        return {part[-1] if "as" in part else part[0].split(".")[0] for part in parts if part}
    if found := re.match(r"([\w.]+(?:\s*,\s*[\w.]+)*)\s*(?::[^=]+)?=(?!=)", head):
        return {name.strip().split(".")[0] for name in found[1].split(",")}
    return set()


def statements(code: str) -> list[tuple[str, str]]:
    """Return each statement at the margin: its first line without strings, and its text."""
    lines = code.split("\n")
    groups: list[list[Line]] = []  # a line at the margin, its decorators, clauses and block
    for line in logical_lines(lines):
        starts = not line.indent and not _CLAUSE.match(line.code)
        if not groups or (starts and groups[-1][-1].code[0] != "@"):
            groups.append([])
        groups[-1].append(line)
    found = []
    for group in groups:
        head = next((line for line in group if line.code[0] != "@"), group[0])
        found.append((head.code, "\n".join(lines[group[0].first : group[-1].last + 1])))
    return found
