"""The graph becomes artifacts and records. The engine's own: nothing here is for plugins."""
