"""Ablations: a set of variants of one run, trained over the same seeds and compared."""
