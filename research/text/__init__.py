"""Tokenizers, chat templates and special tokens."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "special_tokens": ["SpecialTokens"],
    "tokenizer": ["Tokenizer"],
  },
)
