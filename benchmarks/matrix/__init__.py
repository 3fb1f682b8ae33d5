"""Clean pairs of every architecture: ``python -m benchmarks.matrix`` runs them and writes ``docs/matrix.md``."""
