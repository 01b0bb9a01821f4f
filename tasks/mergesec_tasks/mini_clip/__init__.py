"""``mini-clip``: a small CLIP with two trained towers, in the layouts of transformers and of open_clip."""
