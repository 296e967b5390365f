"""Measurements: what docs/benchmarks.md reports, with the commands that print it."""
