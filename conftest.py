"""Fixtures for all tests: ``pytester`` runs a pytest of its own."""

pytest_plugins = ["pytester"]
