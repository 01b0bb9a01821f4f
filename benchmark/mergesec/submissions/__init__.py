"""Entries to the benchmark from outside: made, packed, checked, accepted."""
