"""Diagnosis: where a difference starts. Torch-free."""
