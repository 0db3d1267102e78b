"""What a model is and which rank holds what. Nothing here imports MLX."""
