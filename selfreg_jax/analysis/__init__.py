"""What a network learns: Grad-CAM at every block, redundancy of channels, alignment of blocks with the truth.

    python -m selfreg_jax.analysis --workdir=RUN [--compare=OTHER] --output=DIR

The measures are pure functions that work on any Linen module; docs/analysis.md shows how.
"""
