"""Mapping: which candidate points stand for which reference point, and how to bring them to one shape."""
