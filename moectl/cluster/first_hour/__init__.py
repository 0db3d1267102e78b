"""The first hour on real hosts: what cannot be known before it is measured there, as a report without names."""
