"""The two-way ledger of weights: every checkpoint element consumed, every parameter element written, and unchanged."""
