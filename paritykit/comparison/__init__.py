"""Comparison: align two captures, measure each pair, judge the numbers."""
