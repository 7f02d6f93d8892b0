"""The tasks: examples, prompts, stop strings and scores. Text is theirs and the runner's."""
