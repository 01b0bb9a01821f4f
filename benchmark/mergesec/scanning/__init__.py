"""One incoming expert: what its weights tell before it is merged, and how far that can be trusted."""
