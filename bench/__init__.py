"""Side-by-side performance ratios: each doubles as an equality check and fails when results differ."""
