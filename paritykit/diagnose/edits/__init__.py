"""Causes by edits of the reference's own code: which one change of it gives the candidate's numbers."""
