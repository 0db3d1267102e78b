"""A host over SSH on paramiko: what ssh's configuration says, the key that is offered, the trusted connection."""
