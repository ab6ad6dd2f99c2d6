"""Kubeflow components: one folder a step, nothing in it but types, the image and one call into the library."""

from manyeyes import __version__

# Uploading a pipeline to a cluster puts the image's digest in place of the tag.
IMAGE = f"manyeyes-steps:{__version__}"
