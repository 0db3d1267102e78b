"""From a checkpoint to a shard set on this disk."""
