"""Causes: for each a function from a scene to the hypotheses that would make it the explanation."""
