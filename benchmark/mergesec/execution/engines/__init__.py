"""Engines: each answers "run this step on a device" and nothing else."""
