"""A run's results: rows, rates, tables, figures. Imports neither torch nor transformers."""
