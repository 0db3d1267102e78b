"""The service: `serve` started by launchd or by systemd, at boot or at login."""
