"""Runs generated programs, and nothing else does."""
