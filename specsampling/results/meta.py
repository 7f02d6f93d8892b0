"""Keeps a run's meta: what made its rows, and so which other rows may join them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from specsampling.results.files import RecordsError, read_file
from specsampling.results.lines import CHANGED, SEAL, fits, sealed, unsealed

# All rows of a file share these fields of the meta. Eager runs have no `steps`.
MUST_AGREE = ("config_hash", "precision", "device", "steps")
# The types of the fields that later code reads. A field may be missing.
HINTS: dict[str, Any] = {
    "config": dict[str, Any],
    "config_hash": str,
    "files": dict[str, Any],
    "versions": dict[str, Any],
    "resumed": list[dict[str, Any]],
    "precision": str,
    "device": str,
}
START_OVER = "start over with --fresh, or choose another file with --output"


def read_meta(path: str | Path) -> dict[str, Any]:
    beside = meta_path(Path(path))
    data = read_file(beside)
    meta = None
    with suppress(ValueError, RecursionError):
        meta = json.loads(data)
    if not isinstance(meta, dict):
        raise RecordsError(f"{beside} must hold one JSON object (got {data[:40]!r})")
    meta, is_whole = unsealed(meta)
    if not is_whole:
        raise RecordsError(f"{beside} {CHANGED}; put it back, or delete its field {SEAL}")
    for name, hint in HINTS.items():
        if name in meta and not fits(hint, meta[name]):
            raise RecordsError(
                f"{beside} has a wrong {name} (got {json.dumps(meta[name]):.60}); mend it"
            )
    return meta


def require_own_meta(path: Path) -> None:
    """Raise a RecordsError if the meta of `path` would replace a file that is no run's meta."""
    beside = meta_path(path)
    if not beside.is_file() or not beside.stat().st_size:
        return
    try:
        problem = "" if "config_hash" in read_meta(path) else "it has no config_hash"
    except RecordsError as error:
        problem = str(error)
    if problem:
        raise RecordsError(
            f"{beside} must be a run's meta, because a run would replace it ({problem}); move it "
            "away, or choose another file with --output"
        )


def resumed_meta(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Return the file's meta with what `meta` changes; refuse if their rows cannot join."""
    try:
        old = read_meta(path)
    except RecordsError as error:
        raise RecordsError(f"{path} has rows, but {error}; {START_OVER}") from None
    if any(old.get(name) != meta.get(name) for name in MUST_AGREE):
        names = (*MUST_AGREE, "config")
        was, now = ({name: values.get(name) for name in names} for values in (old, meta))
        raise RecordsError(
            f"{path} belongs to another run: {', '.join(_differences(was, now))}; {START_OVER}"
        )
    if others := sorted(changed_files(old, meta)):
        raise RecordsError(
            f"{path} has rows of other files of the same names: those of {', '.join(others)} have "
            f"changed since; put them back, or {START_OVER}"
        )
    changes = {name: value for name, value in meta.items() if old.get(name) != value}
    return {**old, "resumed": [*old.get("resumed", []), changes]}


def changed_files(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name the models and data for which two metas have different digests."""
    was, now = old.get("files", {}), new.get("files", {})
    return [name for name in was.keys() & now.keys() if was[name] != now[name]]


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
    elif old != new:
        yield f"{path} was {json.dumps(old)}, is now {json.dumps(new)}"


def meta_path(path: Path) -> Path:
    return path.with_suffix(".meta.json")


def meta_bytes(meta: Mapping[str, Any]) -> bytes:
    """Return the bytes of a meta's file, with the seal."""
    return json.dumps(sealed(meta), indent=2).encode() + b"\n"
