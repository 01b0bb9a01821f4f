"""The smallest entry of its kind."""
