"""A decode step for CPUs in C, in which rows never meet."""
