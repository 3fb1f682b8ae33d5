"""The HTML parity report: one file that opens from disk, with no network and no metric computed in it."""
