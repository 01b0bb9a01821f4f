"""Threat model T2: owners who protect experts, and free-riders who merge them all the same."""
