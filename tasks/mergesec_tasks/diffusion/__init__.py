"""The suite ``mini-diffusion``: a class-conditional image generator and four concepts to teach it."""
