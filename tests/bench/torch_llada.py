"""LLaDA's network and loop in torch, as fast as eager torch has them.

The network is the one of arXiv:2502.09992: Llama's layers, no mask in
attention, weights under the names of its own files. The loop is what its
`generate` does: whole rows, logits of every token, softmax over all of them.
"""

import math

import torch
import torch.nn.functional as F


class Llada:
  """The network: a function of tokens.

  Attributes:
    config: config.json of a LLaDA.
    weights: tensors by their names in its files.
  """

  def __init__(self, config: dict, weights: dict[str, torch.Tensor]):
    self.config, self.weights = config, weights

  def rotation(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = self.config["d_model"] // self.config["n_heads"]
    steps = torch.arange(0, size, 2, dtype=torch.float32) / size
    angles = torch.arange(length)[:, None] * self.config["rope_theta"] ** -steps
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()

  def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
    """Returns logits `[B, T, V]`."""
    w, eps = self.weights, self.config["rms_norm_eps"]
    x = F.embedding(tokens, w["model.transformer.wte.weight"])
    rotation = self.rotation(tokens.shape[1])
    for i in range(self.config["n_layers"]):
      own = f"model.transformer.blocks.{i}."

      def linear(y, name, own=own):
        return F.linear(y, w[f"{own}{name}.weight"])

      def norm(y, name, own=own):
        return F.rms_norm(y, y.shape[-1:], w[f"{own}{name}.weight"], eps)

      h = norm(x, "attn_norm")
      q, k, v = (self.heads(linear(h, f"{name}_proj")) for name in "qkv")
      y = F.scaled_dot_product_attention(
        turned(q, *rotation), turned(k, *rotation), v
      )
      x = x + linear(y.transpose(1, 2).flatten(2), "attn_out")
      h = norm(x, "ff_norm")
      gate = F.silu(linear(h, "ff_proj")) * linear(h, "up_proj")
      x = x + linear(gate, "ff_out")
    x = F.rms_norm(x, x.shape[-1:], w["model.transformer.ln_f.weight"], eps)
    return F.linear(x, w["model.transformer.ff_out.weight"])

  def heads(self, y: torch.Tensor) -> torch.Tensor:
    return y.unflatten(-1, (self.config["n_heads"], -1)).transpose(1, 2)


def turned(x, cos, sin):
  first, second = x.chunk(2, dim=-1)
  return x * cos + torch.cat([-second, first], dim=-1) * sin


def generate(
  model, prompt: torch.Tensor, mask_id: int, length: int, block: int, steps: int
) -> torch.Tensor:
  """Returns filled rows, greedily, the surest places first."""
  rows, before = prompt.shape
  x = torch.full((rows, before + length), mask_id)
  x[:, :before] = prompt
  blocks = length // block
  per_block = steps // blocks
  for n in range(blocks):
    end = before + (n + 1) * block
    for i in range(per_block):
      logits = model(x)
      logits[..., mask_id] = -math.inf
      masked = x == mask_id
      found = logits.argmax(-1)
      p = F.softmax(logits, dim=-1)
      sure = p.gather(-1, found[..., None])[..., 0]
      sure[:, end:] = -math.inf
      sure = torch.where(masked, sure, -math.inf)
      found = torch.where(masked, found, x)
      number = block // per_block + (i < block % per_block)
      for row in range(rows):
        place = sure[row].topk(number).indices
        x[row, place] = found[row, place]
  return x


def loss(model, tokens: torch.Tensor, mask_id: int, low: float = 1e-3):
  """Returns LLaDA's pre-training loss; times and masks are drawn here."""
  rows, length = tokens.shape
  t = (1 - low) * torch.rand(rows, 1) + low
  masked = torch.rand(rows, length) < t
  logits = model(torch.where(masked, mask_id, tokens))
  ce = F.cross_entropy(logits[masked], tokens[masked], reduction="none")
  return (ce / t.expand(rows, length)[masked]).sum() / (rows * length)
