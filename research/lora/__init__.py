"""Parameter-efficient fine-tuning: LoRA and related methods.

`method` is the interface of a method, `methods/` has one file per method,
`adapted` the adapted weight, `adapt` the transform that adds adapters. `merge/`
merges adapters, `optim/` has their optimizers, `serving/` pools of adapters,
`diagnosis/` spectra and memory.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "adapt": ["Adapt"],
    "adapt_eva": ["AdaptEVA"],
    "adapted": ["AdaptedTensor"],
    "allocate": ["Budget"],
    "init_stats": ["CalibrationData", "Covariances", "Gradients", "InputPCA"],
    "loftq": ["LoftQ"],
    "method": ["MatrixSpec", "Method"],
    "methods.lora": ["LoRA"],
    "to_lora": ["Energy", "Rank"],
    "wrap": ["TRAINABLE", "disable", "matrices"],
  },
)
