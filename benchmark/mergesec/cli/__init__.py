"""The ``bench`` command: one file a verb. Nothing here imports torch."""
