"""Text from masked diffusion models: one loop, many denoisers and policies.

`config` has all settings, `sampler` the loop, `candidates` what a step
proposes, `policies` which proposals it keeps, `layout` rows of few lengths,
`variable_length` answers that grow. `denoiser` is the interface to a model,
with `NoCache`, `BlockCache` and what its caches share; `prefix_cache`,
`delayed_kv_cache` and `block_causal` are other caches,
`classifier_free_guidance` and `credit` denoisers around a denoiser, and
`make_denoiser` picks one by the settings. `ancestral` and `remask` sample
places by chance; `visualize` shows it.
"""
