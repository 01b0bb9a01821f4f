"""The merger's defenses: one module per defense."""
