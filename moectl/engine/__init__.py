"""What runs on every rank: generation in lockstep, and the protocol between session and worker."""
