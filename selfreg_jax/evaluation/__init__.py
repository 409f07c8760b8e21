"""Whole-volume inference, the two metric protocols, and the report."""
