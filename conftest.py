"""Fixtures for all tests: ``pytester`` runs a pytest of its own.

What the reference gives is kept for the time of the tests, and shared by the processes that run them; the user's own
cache is left alone.
"""

import os
import tempfile

pytest_plugins = ["pytester"]

if "PARITYKIT_CACHE" not in os.environ:
    _kept = tempfile.TemporaryDirectory(prefix="paritykit-tests-")
    os.environ["PARITYKIT_CACHE"] = _kept.name
