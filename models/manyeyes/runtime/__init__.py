"""Runs an ONNX bundle: numpy, ONNX Runtime, tokenizers and Pillow, no torch.

``preprocess`` turns image bytes into pixels and ``chat`` turns conversations into tokens; training, evaluation and
the bundle all use these two, so that what a model saw is what it will see.
"""
