"""The owner's protections and marks: one module per defense."""
