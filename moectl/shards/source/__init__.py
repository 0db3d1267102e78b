"""A checkpoint: where it comes from, what its headers say, and the bytes of its tensors."""
