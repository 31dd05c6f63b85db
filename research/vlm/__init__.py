"""Vision language models: from pixels to tokens of a language model."""
