"""Addresses and RDMA for Thunderbolt cables."""
