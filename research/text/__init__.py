"""Tokenizers, chat templates and special tokens."""
