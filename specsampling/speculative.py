"""The module `speculative` at the top, for those who have installed the package."""

from speculative import speculative, speculative_stream

__all__ = ["speculative", "speculative_stream"]
