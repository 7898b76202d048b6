"""Comparisons: methods side by side on one task, and their report."""

from e3va_peft.compare.run import Comparison, compare, read_comparison

__all__ = ["Comparison", "compare", "read_comparison"]
