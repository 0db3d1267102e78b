"""One file per verb: its flags, its body, and the text and JSON of its result."""
