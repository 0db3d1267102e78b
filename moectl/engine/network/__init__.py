"""DBRX for MLX: the network, its stacked experts, the sum over ranks, and loading a rank's part of a shard set.

It knows nothing of sampling, prompts or processes.
"""
