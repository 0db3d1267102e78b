"""The command line: what all verbs share; the verbs themselves are in `verbs`, the conversation is in `chat`."""
