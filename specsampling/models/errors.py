"""Errors of models: the cause in one line, and the way out that fits the cause.

This module imports neither torch nor transformers. Their errors are known by name and message.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

MOST_LETTERS = 300
MEMORY_WAY_OUT = "close other programs, raise what `ulimit -v` shows, or choose a smaller model"
# Messages of errors of too little memory that have no type or number of their own.
MEMORY_WORDS = (
    "can't allocate memory",  # torch's allocator, a RuntimeError
    "not enough memory",
    "cannot allocate memory",  # what maps a file
    "std::bad_alloc",
    "can't start new thread",
    "failed to map segment",  # the loader of shared libraries, an ImportError
    "cannot map zero-fill pages",
)


class ModelError(RuntimeError):
    """The error that a model cannot be had. Its one line says why, and the way out."""


def say(line: str) -> None:
    """Print a line about something that takes long or is unexpected."""
    print(line, file=sys.stderr, flush=True)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether an error, or one of its causes, is too little memory of a GPU or machine."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if _is_memory(error):
            return True
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if not isinstance(error, (RuntimeError, ImportError, OSError)):
        return False
    is_told = any(words in str(error).lower() for words in MEMORY_WORDS)
    return is_told or getattr(error, "errno", None) == errno.ENOMEM


def reason(error: BaseException) -> str:
    """Describe an exception in one line, with its type if the text alone says little."""
    first, *others = [*str(error).strip().splitlines(), ""]
    if first.rstrip().endswith(":") and others[0]:  # only a heading
        first = f"{first.rstrip()} {others[0].strip()}"
    line = first.rstrip(".")[:MOST_LETTERS]
    if line and isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        return line
    return f"{type(error).__name__}: {line}".removesuffix(": ")


def model_error(failure: str, error: BaseException, way_out: str) -> ModelError:
    """Make an error of what failed, why, and the way out. Too little memory has its own."""
    if is_out_of_memory(error):
        return ModelError(f"{failure}: out of memory ({reason(error)}); {MEMORY_WAY_OUT}")
    return ModelError(f"{failure} ({reason(error)}); {way_out}")


def way_out_of(error: BaseException, spec: str) -> str:
    """Say what a user can do about an error of reading a spec's files."""
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return "it needs code of its own (auto_map), which is not run here; choose another model"
    if isinstance(error, ImportError) or "bitsandbytes" in text:
        return 'install what it needs, for 8 and 4 bit with: pip install ".[quant]"'
    if "untagged enum" in text or "unknown variant" in text:
        return (
            "its tokenizer.json may be of a newer library: pip install -U tokenizers transformers"
        )
    if "does not recognize this architecture" in text:
        return "it may be of a newer library: pip install -U transformers, or choose another model"
    if isinstance(error, PermissionError):
        return "see that you may read its files"
    if Path(spec).exists():
        return "download or convert it again"
    return "check the name and the network, or give a local folder"
