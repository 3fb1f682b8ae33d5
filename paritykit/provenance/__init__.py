"""Weight provenance: where each element of a checkpoint landed in an engine, as its own loader put it."""
