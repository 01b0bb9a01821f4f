"""A grid file becomes a graph of keyed steps. The engine's own: nothing here is for plugins."""
