"""A model by looking at it: its module tree as mlx-lm builds it, and what of it can be divided."""
