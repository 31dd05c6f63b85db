"""A loaded model as what writes solutions: of text alone, or with images."""

from collections.abc import Sequence
from typing import NamedTuple

from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.make_denoiser import make_denoiser
from research.generation import generate
from research.generation.sampling import Sampling
from research.generation.stepwise import PromptReader
from research.interop.diffusion.spec import Spec
from research.interop.loaded import Loaded
from research.nn.transformer import Transformer
from research.search.diffusion_policy import DiffusionPolicy
from research.typing import Params, UserError
from research.vlm.model import VisionLanguageModel
from research.vlm.prompts.reader import ImageReader


class TokenPolicy(NamedTuple):
  """A language model that writes token by token.

  Attributes:
    model: the language model.
    loaded: its parameters as they were loaded.
    params: the same in the layout that decodes fastest.
    reader: gives the parameters that read prompts; None: `params` do.
  """

  model: Transformer
  loaded: Params
  params: Params
  reader: PromptReader | None = None


def policy_of(
  loaded: Loaded, prompts: Sequence[Sequence[int]], where: str
) -> TokenPolicy:
  """Returns what writes solutions.

  Args:
    prompts: of which the first one shows what stands beside their tokens.

  Raises:
    UserError: it is neither; or the prompts have no images for one that sees
      them.
  """
  if isinstance(loaded.model, VisionLanguageModel):
    model, params = loaded.model.language, loaded.params["language"]
  else:
    model, params = loaded.model, loaded.params
  if not isinstance(model, Transformer):
    raise UserError(
      f"{where}: found a {type(model).__name__}, expected an autoregressive"
      " language model."
    )
  prepared = generate.prepare(params, model)
  if not isinstance(loaded.model, VisionLanguageModel):
    return TokenPolicy(model, params, prepared)
  towers = {**loaded.params, "language": prepared}
  reader = ImageReader.of_prompts(loaded.model, towers, prompts)
  return TokenPolicy(model, params, reader.text_params, reader)


def diffusion_policy(
  found: TokenPolicy,
  config: SamplerConfig,
  spec: Spec | None,
  stop: Sequence[int],
  new_tokens: int,
  sampling: Sampling,
) -> DiffusionPolicy:
  """Returns a masked diffusion model as what writes solutions, block by block.

  Args:
    config: settings of the sampler; with the mask's id where `spec` has none.
    new_tokens: of a solution, a multiple of the block.

  Raises:
    UserError: nothing says which id the mask is.
  """
  mask = config.mask_id
  if mask is None and spec is not None:
    mask = spec.mask_id
  if mask is None:
    raise UserError(
      "SearchRun.sampler: the model's files do not name its mask token; set"
      " SamplerConfig.mask_id to the id that it was trained with"
    )
  config = config.for_model(mask, stop, length=new_tokens)
  shift, block = (False, None) if spec is None else (spec.shift, spec.block)
  return DiffusionPolicy(
    denoiser=make_denoiser(config, found.model, shift, block),
    params=found.params,
    config=config,
    sampling=sampling,
    reader=found.reader,
  )
