"""Process reward models: models that judge every step of an answer.

`formats/` reads and writes the published layouts of labelled steps, `labels/`
derives labels from rollouts and oracles, `scores/` aggregates, calibrates and
evaluates, `attacks` changes solutions: none of these needs a model, or JAX.
`model` has reward models on any backbone, `objective` their losses.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "attacks": [
      "ATTACKS",
      "Attacked",
      "Confident",
      "Corrupted",
      "Inflated",
      "Merged",
      "Reordered",
      "Split",
    ],
    "heads": ["LinearHead", "MlpHead"],
    "labelled": ["LabelledSolution"],
    "model": ["GenerativeReward", "RewardModel"],
    "objective": ["StepReward"],
  },
)
