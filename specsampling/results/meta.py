"""What made a run's rows, kept beside them, and whether others may join them.

Knows nothing of rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from specsampling.results.files import RecordsError, read_file

# In the meta, for rows to share a file; no `steps` where these are eager.
MUST_AGREE = ("config_hash", "precision", "device", "steps")
START_OVER = "start over with --fresh, or choose another file with --output"


def read_meta(path: str | Path) -> dict[str, Any]:
    """What the rows in `path` were made with."""
    beside = meta_path(Path(path))
    data = read_file(beside)
    with suppress(ValueError):
        meta = json.loads(data)
        if isinstance(meta, dict):
            return meta
    raise RecordsError(f"{beside} must hold one JSON object (got {data[:40]!r})")


def resumed_meta(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The file's own meta with what is different now, if its rows can go on under `meta`."""
    try:
        old = read_meta(path)
    except RecordsError as error:
        raise RecordsError(f"{path} has rows, but {error}; {START_OVER}") from None
    if any(old.get(name) != meta.get(name) for name in MUST_AGREE):
        names = (*MUST_AGREE, "config")
        was, now = ({name: values.get(name) for name in names} for values in (old, meta))
        raise RecordsError(
            f"{path} is another run's: {', '.join(_differences(was, now))}; {START_OVER}"
        )
    changes = {name: value for name, value in meta.items() if old.get(name) != value}
    return {**old, "resumed": [*old.get("resumed", []), changes]}


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
    elif old != new:
        yield f"{path} was {json.dumps(old)}, is now {json.dumps(new)}"


def meta_path(path: Path) -> Path:
    return path.with_suffix(".meta.json")


def meta_text(meta: dict[str, Any]) -> str:
    return json.dumps(meta, indent=2) + "\n"
