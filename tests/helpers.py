"""What several test files share: the one line of a mistake, a changed file, a model's logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specsampling.edge import exit_code
from specsampling.method.session import Session
from specsampling.models.kernel_model import KernelModel


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


def refused(main: Callable, arguments: list, capsys: pytest.CaptureFixture) -> str:
    """What a script says to arguments that it does not take: nothing but one line."""
    assert exit_code(main, list(map(str, arguments))) == 2
    printed, errors = capsys.readouterr()
    assert (printed, errors.count("\n")) == ("", 1)
    return errors


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits_of(model: Any, num_tokens: int, vocab_size: int) -> torch.Tensor:
    """Logits of a random text: [num_tokens, V], by the kernel or by PyTorch."""
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab_size, (1, num_tokens), generator=chance)
    if isinstance(model, KernelModel):
        return Session(model, num_tokens).score(tokens[0].tolist(), last=num_tokens)
    with torch.inference_mode():
        return model(input_ids=tokens).logits[0].float()
