"""Records become boards: no torch, no planner, no store. The engine's own."""
