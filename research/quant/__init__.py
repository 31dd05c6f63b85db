"""Low-bit quantization of weights, activations and the KV cache.

`format` is the interface of a format, `formats/` has one file per format,
`qtensor` the packed weight, `quantize` and `quantize_by_rules` the transforms
that pack a model. `algorithms/` has GPTQ, AWQ and others, `kv/` the quantized
KV cache, `layouts/` kernels' weight layouts, `numerics/` low-bit arithmetic,
`reports/` errors.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "format": ["Format"],
    "formats.codebook": ["Codebook"],
    "methods": ["GPTQMethod", "Method", "RoundToNearest"],
    "qtensor": ["QTensor", "pack"],
    "quantize": ["Cast", "Quantize"],
    "quantize_by_rules": ["Quantization", "Rule"],
  },
)
