"""The module `autoregressive` at the top, for those who have installed the package."""

from autoregressive import autoregressive, autoregressive_stream

__all__ = ["autoregressive", "autoregressive_stream"]
