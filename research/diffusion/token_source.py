"""A masked diffusion model wherever tokens are generated after prompts.

`generation.generate.generate(source=...)` asks a `TokenSource` for the tokens
that follow; `DiffusionSource` fills in masks for them.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.diffusion.sampling import layout, sampler
from research.diffusion.sampling.config import Prefix, SamplerConfig
from research.diffusion.sampling.make_denoiser import make_denoiser
from research.generation import generate
from research.generation.generated import NO_TOKEN
from research.generation.sampling import GREEDY, Sampling
from research.nn.transformer import Transformer
from research.typing import Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionSource:
  """Tokens after prompts, from a model whose tokens all see each other.

  Prompts may have placeholders of images, which the model reads in every call
  or keeps in a cache of all before a block. They are never masked.

  Attributes:
    mask_id: of the mask.
    config: of the sampler; its length is that of what is generated.
    shift: whether a token is predicted by the state before it, see
      `denoiser.own_rows`.
  """

  mask_id: int
  config: SamplerConfig = SamplerConfig()
  shift: bool = False

  def __post_init__(self):
    # Guidance hides prompts, other caches read a part of one again: either
    # would count its placeholders from the wrong one on.
    if self.config.guidance:
      raise UserError(
        f"DiffusionSource: {self.config.show('guidance')}, expected 0: guidance"
        " masks the prompt, and images cannot be masked"
      )
    if not isinstance(self.config.cache, Prefix | None):
      raise UserError(
        f"DiffusionSource: {self.config.show('cache')}, expected none or prefix"
      )
    if self.config.canvas is not None:
      raise UserError(
        f"DiffusionSource: {self.config.show('canvas')}, expected fixed"
      )

  def __call__(
    self,
    model: Transformer,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: PRNGKey | None = None,
    stop_tokens: Sequence[int] = (),
    examples: Sequence[int] | None = None,
    size: int | None = None,
  ) -> Iterator[np.ndarray]:
    """Yields new tokens `[B, n]`, `NO_TOKEN` after a row's end.

    Args:
      model, params, prompts, sampling, key, stop_tokens, examples: as for
        `generation.generate.chunks`.
      max_new_tokens: masks after each prompt.
      size: tokens per chunk; by default all at once. No chunk is there before
        all masks are filled, in whatever order.

    Raises:
      UserError: a prompt is empty, has the mask or ids outside the vocabulary,
        or there is no room for so many tokens.
    """
    extra = weights.extra_ids(params)
    room = generate.token_limits(model, prompts, max_new_tokens, extra)
    if min(room) < max_new_tokens:
      raise UserError(
        f"prompts: found room for {min(room)} new tokens, expected"
        f" {max_new_tokens}, in the model's context of {model.max_positions}"
      )
    config = self.config.for_model(
      self.mask_id, stop_tokens, length=max_new_tokens
    )
    state = sampler.start(
      [list(prompt) for prompt in prompts],
      config,
      jax.random.key(0) if key is None else key,
      None if examples is None else jnp.asarray(examples, jnp.int32),
      layout.width(max(map(len, prompts)), config.length),
    )
    tokens = jnp.where(state.valid, state.tokens, NO_TOKEN)
    found = sampler.sample(
      make_denoiser(config, model, self.shift),
      weights.with_tokens(params, tokens),
      state,
      config,
      sampling,
    )
    new = found.tokens[:, -config.length :]
    ended = np.isin(new, config.end)
    behind = np.cumsum(ended, axis=-1) - ended > 0
    new = np.where(behind, NO_TOKEN, new)
    for at in range(0, config.length, size or config.length):
      yield new[:, at : at + (size or config.length)]
