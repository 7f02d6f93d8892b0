"""How a user is told of a mistake: in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from specsampling.console import exit_code


def one_line(kind: type[Exception], call: Callable, *arguments, **options) -> str:
    """The message of an error."""
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(main: Callable, arguments: list, capsys: pytest.CaptureFixture) -> str:
    """What a script says to arguments that it does not take: nothing but one line."""
    assert exit_code(main, [*map(str, arguments)]) == 2
    printed, errors = capsys.readouterr()
    assert (printed, errors.count("\n")) == ("", 1)
    return errors
