"""From documents to batches: tokenise, pack, shuffle, mix."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "batches": ["batch_of"],
    "bucketing": ["BucketRows", "BucketedBatches"],
    "examples": ["Example", "Tokens"],
    "packing": ["PackedRows", "best_fit", "concatenate"],
    "pipeline": ["Data", "Mixture", "Pipeline"],
  },
)
