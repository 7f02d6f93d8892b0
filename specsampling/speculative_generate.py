"""The module `speculative_generate` at the top, for those who have installed the package."""

from speculative_generate import GenerateError, speculative_generate

__all__ = ["GenerateError", "speculative_generate"]
