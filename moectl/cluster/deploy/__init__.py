"""Software and shards to every host, and away again."""
