"""Run a mixture-of-experts model across several machines; this file holds the version, its date and nothing else."""

__version__ = "0.1.0"
__date__ = "2026-11-21"
