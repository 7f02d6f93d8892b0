"""What goes wrong with a model."""


class ModelError(RuntimeError):
    """A model cannot be had; one clear line that says why and the way out."""
