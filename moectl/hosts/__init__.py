"""One host: its line in hosts.txt, the way to it, and what it is made of."""
