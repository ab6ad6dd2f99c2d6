"""Cambrian-1's data engine: questions about figures of web pages, written from the text around them."""
