"""Generators of the diffusers library: UNets, DiT and SD3 from folders of pipelines, and subjects to teach them."""
