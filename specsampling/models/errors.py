"""What goes wrong with a model: its cause in one line, and the way out that fits the cause.

Imports neither torch nor transformers: their errors are known by name and by what they say.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

MOST_LETTERS = 300
MEMORY_WAY_OUT = "close other programs, raise what `ulimit -v` shows, or choose a smaller model"
# What errors without a type or a number of their own say of too little memory.
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
    """A model cannot be had; one clear line that says why and the way out."""


def say(line: str) -> None:
    """Print a line about what takes long, or went otherwise than expected."""
    print(line, file=sys.stderr, flush=True)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU or the machine had no more to give, be it only the cause of the error."""
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
    """An exception in one line, with its type where the text alone says little."""
    first, *others = [*str(error).strip().splitlines(), ""]
    if first.rstrip().endswith(":") and others[0]:  # a heading of what comes
        first = f"{first.rstrip()} {others[0].strip()}"
    line = first.rstrip(".")[:MOST_LETTERS]
    if line and isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        return line
    return f"{type(error).__name__}: {line}".removesuffix(": ")


def model_error(failure: str, error: BaseException, way_out: str) -> ModelError:
    """An error as one line: what failed, why, and the way out; too little memory has its own."""
    if is_out_of_memory(error):
        return ModelError(f"{failure}: out of memory ({reason(error)}); {MEMORY_WAY_OUT}")
    return ModelError(f"{failure} ({reason(error)}); {way_out}")


def way_out_of(error: BaseException, spec: str) -> str:
    """What a user can do about an error of reading a spec's files."""
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
