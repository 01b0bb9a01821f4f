"""The free-rider's attacks: one module per attack."""
