"""The embedded engine: small, readable, always there. Each step of it can be checked against the one before."""
