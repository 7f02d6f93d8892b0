"""The papers: sampling, verifying, sessions, drafts. Tensors and token ids only."""
