"""Loads models, checks them and makes them fast.

The names that a user needs are here. They are imported when they are asked for, because
`models.embedded` must be importable without torch.
"""

from typing import Any

PUBLIC = ("Pair", "load_pair", "model_location")


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from specsampling.models import load

    return getattr(load, name)
