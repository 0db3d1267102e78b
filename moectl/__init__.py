"""Run a mixture-of-experts model across several machines; this file holds the version and nothing else."""

__version__ = "0.1.0"
