"""Parameter-efficient fine-tuning: LoRA and related methods.

`method` is the interface of a method, `methods/` has one file per method,
`adapted` the adapted weight, `adapt` the transform that adds adapters. `merge/`
merges adapters, `optim/` has their optimizers, `serving/` pools of adapters,
`diagnosis/` spectra and memory.
"""
