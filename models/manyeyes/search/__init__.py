"""Trials and variants of a recipe."""
