"""Threat model T1: contributors who publish backdoored experts, and mergers who defend."""
