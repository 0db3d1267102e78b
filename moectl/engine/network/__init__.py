"""DBRX for MLX: the network (`dbrx`), its stacked experts (`experts`), the sum over ranks (`reduce`), and loading a
rank's part of a shard set (`load`). It knows nothing of sampling, prompts or processes."""
