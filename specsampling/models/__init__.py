"""Models: loaded, checked, made fast.

What a user needs is here by name; it is imported when it is asked for, because
`models.embedded` must open without torch.
"""

from typing import Any

PUBLIC = ("Pair", "load_pair", "model_location")


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from specsampling.models import load

    return getattr(load, name)
