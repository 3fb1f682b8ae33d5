"""Captures: what one engine computed on some cases, on disk, in one format."""
