"""Things done to all hosts at once."""
