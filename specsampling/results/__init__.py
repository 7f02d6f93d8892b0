"""What came of a run: rows, rates, tables, figures. Neither torch nor transformers."""
