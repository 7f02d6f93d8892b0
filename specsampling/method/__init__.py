"""Implements the papers: sampling, verifying, sessions, drafts. It sees only tensors and ids."""
