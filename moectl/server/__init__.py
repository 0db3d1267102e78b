"""Many users of one session: the controller, its OpenAI-compatible API, and the client."""
