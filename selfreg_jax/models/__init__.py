"""Networks of the paper in Flax Linen, and the way from PyTorch weights."""
