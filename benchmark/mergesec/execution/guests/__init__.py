"""Foreign code runs here: plugins' hooks in processes of their own, which hold no labels and no store."""
