"""Snapshots, records and mixtures."""
