"""Keeps a run's meta: what made its rows, and so which other rows may join them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from specsampling.config import deciding
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
# The libraries that decode: their versions may change speeds, as the machine does.
DECODERS = "torch", "transformers", "accelerate", "bitsandbytes"
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
        was, now = ({name: of.get(name) for name in MUST_AGREE} for of in (old, meta))
        fields, ours = (deciding(of.get("config", {})) for of in (old, meta))
        if told := list(_differences(fields, ours)):  # they say more than the hash
            was["config_hash"] = now["config_hash"]
        told += _differences(was, now)
        raise RecordsError(f"{path} belongs to another run: {', '.join(told)}; {START_OVER}")
    if others := sorted(changed_files(old, meta)):
        raise RecordsError(
            f"{path} has rows of other files of the same names: those of {', '.join(others)} have "
            f"changed since; put them back, or {START_OVER}"
        )
    changes = {name: value for name, value in meta.items() if old.get(name) != value}
    return {**old, "resumed": [*old.get("resumed", []), changes]}


def starts_of(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the whole meta of each start of a run."""
    return [{**meta, **changes} for changes in ({}, *meta.get("resumed", []))]


def machine_of(meta: Mapping[str, Any]) -> str | None:
    """Name what speeds depend on: device, threads, precision and libraries; None if not known."""
    if "device_name" not in meta:
        return None
    versions = meta.get("versions", {})
    libraries = [f"{name} {versions[name]}" for name in DECODERS if name in versions]
    parts = meta["device_name"], f"{meta.get('threads')} threads", meta.get("precision", "")
    return ", ".join([*parts, *libraries])


def machines_of(meta: Mapping[str, Any]) -> list[str]:
    """Name the machines of all starts of a run, each once."""
    return list(dict.fromkeys(filter(None, map(machine_of, starts_of(meta)))))


def device_names(meta: Mapping[str, Any]) -> str:
    """Name the devices of all starts of a run."""
    names = (start.get("device_name") for start in starts_of(meta))
    return " and ".join(dict.fromkeys(filter(None, names)))


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
