"""Models as the lm-evaluation-harness asks them."""

from research.interop.lm_eval.lm_eval import (
  adapter,
  generate_until,
  loglikelihood,
  rolling,
  score,
)

__all__ = [
  "adapter",
  "generate_until",
  "loglikelihood",
  "rolling",
  "score",
]
