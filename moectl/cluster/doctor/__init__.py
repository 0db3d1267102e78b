"""Checks, host by host, then pair by pair."""
