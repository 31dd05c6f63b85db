"""Models as the lm-evaluation-harness asks them."""

from research.interop.lm_eval.autoregressive import (
  generate_until,
  loglikelihood,
  rolling,
  score,
)
from research.interop.lm_eval.harness import adapter

__all__ = [
  "adapter",
  "generate_until",
  "loglikelihood",
  "rolling",
  "score",
]
