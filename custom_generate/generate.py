"""The recipe that `model.generate(..., custom_generate=FOLDER, trust_remote_code=True)` runs.

It needs this package: `pip install .` in the folder.
"""

from typing import Any

from speculative_generate import speculative_generate


def generate(model: Any, **arguments: Any) -> Any:
    """Continue one text; see `speculative_generate`."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return speculative_generate(model, **given)
