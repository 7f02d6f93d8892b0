"""The tasks: examples, prompts, stop strings, scores. Only tasks and the runner handle text."""
