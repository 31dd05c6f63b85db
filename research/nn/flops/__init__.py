"""FLOPs of a model: counted in a traced function, or in closed form.

A product of [n, a] and [a, b] is 2 n a b FLOPs. Norms, activations, rotations
and softmax are not counted. The closed forms do not import JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "closed_form": [
      "Blockwise",
      "Cached",
      "Causal",
      "Context",
      "Dense",
      "LayerCost",
      "ModelCost",
      "layer_cost",
      "model_cost",
    ],
    "traced": ["count_flops"],
  },
)
