"""Invariance: one engine gives the same however it is run. The same cases under two conditions, compared."""
