"""Serves a bundle over HTTP, in OpenAI's format, without torch."""
