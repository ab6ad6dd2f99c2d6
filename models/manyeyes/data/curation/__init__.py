"""Curation: which samples of some data sets make a training mixture, and why each of the others does not."""
