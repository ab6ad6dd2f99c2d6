"""From a checkpoint to an ONNX bundle, and whether the bundle answers as torch does."""
