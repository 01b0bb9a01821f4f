"""Weights files read, merged and written without loading them whole. The engine's own."""
