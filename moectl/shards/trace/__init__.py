"""Where the bytes of each parameter come from: mlx-lm's own loading, traced."""
