"""Data that a language model writes, from texts about images, from captions, dialogues and pages of the web."""
