"""Language models that write critiques of steps, as verifiers of a search."""

import dataclasses

from experiments.core.experiment import Source
from experiments.searching.context import Context
from research.generation import generate
from research.generation.sampling import GREEDY, Sampling
from research.nn.transformer import Transformer
from research.search.generative_judge import (
  GenerativeJudge,
  GenPRMChat,
  JudgeFormat,
  LanguageModelWriter,
)
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatJudge:
  """A chat model that judges each step (`search.generative_judge`).

  Attributes:
    model: the judge, whose tokenizer needs a chat template; None for the
      policy, which then judges itself.
    format: what it is shown, and where it decides.
    count: critiques of each step.
    sampling: how critiques are drawn; several differ only with a temperature.
    max_new_tokens: length limit of a critique.
  """

  model: Source | None = None
  format: JudgeFormat = GenPRMChat()
  count: int = 1
  sampling: Sampling = GREEDY
  max_new_tokens: int = 512

  def load(self, context: Context) -> GenerativeJudge:
    """Returns the verifier.

    Raises:
      UserError: the model is no language model with a tokenizer.
    """
    if self.model is None:
      policy = context.policy
      model = getattr(policy, "model", None)
      params, tokenizer = getattr(policy, "params", {}), context.tokenizer
    else:
      judge = self.model.load()
      model, tokenizer = judge.model, judge.tokenizer
      params = generate.prepare(judge.params, model)
    if not isinstance(model, Transformer) or not hasattr(tokenizer, "chat"):
      raise UserError(
        f"ChatJudge.model: found a {type(model).__name__}, expected an"
        " autoregressive language model with a tokenizer"
      )
    writer = LanguageModelWriter(
      model=model,
      params=params,
      encode=lambda turns: tokenizer.encode(
        tokenizer.chat([{"role": r, "content": text} for r, text in turns])
      ),
      decode=tokenizer.decode,
      sampling=self.sampling,
      stop_tokens=tokenizer.stop,
      max_new_tokens=self.max_new_tokens,
    )
    return GenerativeJudge(
      writer=writer,
      text=context.tokenizer.decode,
      format=self.format,
      count=self.count,
    )
