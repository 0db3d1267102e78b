"""Does a model fit, and how fast will it be: numbers only, nothing is asked over a network."""
