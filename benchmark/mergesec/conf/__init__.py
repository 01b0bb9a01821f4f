"""Preset grids and suites, found by Hydra as ``pkg://mergesec.conf``."""
