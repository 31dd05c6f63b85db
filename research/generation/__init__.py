"""Autoregressive decoding: sampling, streaming, pages, perplexity."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "boundary": ["Boundary"],
    "generated": ["Generated"],
    "page_allocator": ["PageAllocator"],
    "paging": ["Paging"],
    "perplexity": ["Perplexity"],
    "sampling": ["Sampling"],
    "stepwise": ["Stepwise"],
    "stream": ["complete"],
  },
)
