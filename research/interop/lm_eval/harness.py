"""A model behind the interface of lm-evaluation-harness.

Only `adapter` imports the harness (extra `evaluation`; no torch is needed):

  lm_eval.simple_evaluate(model=adapter(load_model(NAME)), tasks=[...])

The functions behind it need nothing but this library: those of `autoregressive`
for models that predict the next token, those of `lm_eval_diffusion` for models
that fill in masks.
"""

from typing import Any

from research.interop.lm_eval import (
  autoregressive,
  harness_requests,
  lm_eval_diffusion,
)
from research.interop.loaded import Loaded
from research.typing import UserError


def adapter(
  loaded: Loaded,
  batch: int = 8,
  diffusion: lm_eval_diffusion.DiffusionEvalSettings | None = None,
) -> Any:
  """Returns the model as an `lm_eval.api.model.LM`.

  Args:
    loaded: of either kind: a masked diffusion model is scored by estimates.

  Raises:
    UserError: the harness is not installed, or there is no tokenizer.
  """
  if loaded.tokenizer is None:
    raise UserError(f"{loaded.source}: has no tokenizer, and tasks are text.")
  try:
    from lm_eval.api.model import LM
  except ImportError as error:
    raise UserError(
      f"lm-evaluation-harness is not installed ({error}).\n"
      "In Heptad's folder: pip install -e '.[evaluation]'"
    ) from error

  backend: Any = autoregressive
  if loaded.diffusion is not None:
    backend = lm_eval_diffusion.bound(
      diffusion or lm_eval_diffusion.DiffusionEvalSettings()
    )

  class Heptad(LM):
    tokenizer_name = "heptad"

    def loglikelihood(self, requests, disable_tqdm=False):
      return backend.loglikelihood(loaded, [r.args for r in requests], batch)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      return backend.rolling(loaded, [r.args[0] for r in requests], batch)

    def generate_until(self, requests, disable_tqdm=False):
      return backend.generate_until(loaded, [r.args for r in requests], batch)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      if add_generation_prompt:
        return loaded.tokenizer.chat(chat_history)
      return harness_requests.unfinished(loaded.tokenizer, chat_history)

  return Heptad()
