"""How a mistake is told: one line, in an exception or at the end of a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specsampling.edge import exit_code


def error_line(kind: type[Exception], act: Callable, *arguments: Any, **options: Any) -> str:
    """The message of the error that a call must end in."""
    with pytest.raises(kind) as caught:
        act(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def mistake(main: Callable, arguments: list, capsys: pytest.CaptureFixture) -> str:
    """What a script says last of a user's mistake, with exit code 2 and nothing else printed."""
    assert exit_code(main, list(map(str, arguments))) == 2
    printed, errors = capsys.readouterr()
    *_, line = errors.splitlines()
    assert line.startswith("error: ") and printed == "" and "Traceback" not in errors
    return line


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
