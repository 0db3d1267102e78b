"""Programs sent to a host's own python. They use the standard library of Python 3.9 and import nothing of moectl."""
