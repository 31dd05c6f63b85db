"""Vision language models: from pixels to tokens that a language model reads.

`images/` makes of an image file what an encoder takes, without JAX.
"""
