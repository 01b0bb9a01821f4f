"""Poisoned contributions: one module per attack."""
