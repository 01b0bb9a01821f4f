"""What ``import mergesec`` offers: grids, boards and single steps from Python. Nothing here is for plugins."""
