"""Process reward models: models that judge every step of an answer.

`formats/` reads and writes the published layouts of labelled steps, `champ` a
set that people labelled, `labels/` derives labels from rollouts and oracles,
`scores/` aggregates, calibrates and evaluates, `attacks` changes solutions:
none of these needs a model, or JAX.
`model` has reward models on any backbone, `objective` their losses, `rows` the
data of these; `policy_samples` labels what a policy writes, `judge` scores it,
and `scored_task` makes its scores the reward of a policy.
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
    "champ": ["Champ"],
    "heads": ["LinearHead", "MlpHead"],
    "judge": ["StepEvaluation", "score_solutions"],
    "labelled": ["LabelledSolution"],
    "model": ["GenerativeReward", "RewardModel"],
    "objective": ["StepReward"],
    "policy_samples": [
      "PolicySampler",
      "sample_solutions",
      "with_exact_labels",
      "with_rollouts",
    ],
    "rows": ["LabelledRows"],
    "scored_task": ["ScoredTask"],
  },
)
