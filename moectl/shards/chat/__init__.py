"""Tokens and text: tokenizers, chat templates, thinking."""
