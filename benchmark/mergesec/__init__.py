"""MergeSec: a benchmark for the security of model merging. The engine; it imports neither catalogue."""

__version__ = "0.1.0"
