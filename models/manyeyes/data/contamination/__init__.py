"""Contamination: what training data and benchmarks share. See docs/contamination.md."""
