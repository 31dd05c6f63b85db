"""Writes vision_masks.json: the attention masks of transformers' vision models.

  .venv-peers/bin/python tests/golden/make_vision_masks.py [--to FILE]

Each mask is rows of text, a query each, `#` where a key is visible. A row of
`types` has v for vision, p for a text prefix, t for other text, - for padding
on the right. The window of sliding layers is 5.
"""

import argparse
import json
import pathlib

import torch
from transformers import Gemma3TextConfig, masking_utils
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma4 import modeling_gemma4

FILE = pathlib.Path(__file__).with_name("vision_masks.json")
WINDOW = 5
TYPES = ["vvvvttvvvvvvvtvt", "tvvvvttttttvvtt-", "tttttttt--------"]
PREFIXED = ["vvvvpptttttt----", "vvvvppppppppptt-", "vvvvtttttttttttt"]
"""As PaliGemma has them: images and prompt come first."""


def shown(mask: torch.Tensor) -> list[list[str]]:
  """Draws masks [B, 1, T, T] that are added to logits."""
  return [
    ["".join(".#"[int(k == 0)] for k in row) for row in one[0]] for one in mask
  ]


def masks(types: list[str]) -> dict:
  """Returns the arguments that all masks share."""
  alive = torch.tensor([[c != "-" for c in row] for row in types])
  config = Gemma3TextConfig(sliding_window=WINDOW)
  config._attn_implementation = "eager"
  return {
    "config": config,
    "inputs_embeds": torch.zeros(*alive.shape, 8),
    "attention_mask": alive.long(),
    "cache": None,
    "position_ids": None,
  }


def of_type(types: list[str], letters: str) -> torch.Tensor:
  return torch.tensor([[int(c in letters) for c in row] for row in types])


def make() -> dict:
  """Returns the contents of the file."""
  vision, prefix = of_type(TYPES, "v"), of_type(PREFIXED, "vp")
  given, out = masks(TYPES), {}
  for name, module in (
    ("gemma3", modeling_gemma3),
    ("gemma4", modeling_gemma4),
  ):
    found = module.create_masks_for_vision_model(
      **given,
      block_sequence_ids=module.get_block_sequence_ids_for_mask(
        vision, device="cpu"
      ),
    )
    for kind in ("full", "sliding"):
      out[f"{name}_{kind}"] = shown(found[f"{kind}_attention"])
  # Molmo2Model.forward and PaliGemmaModel.forward have these ids.
  for name, how, same in (
    ("molmo2", given, vision),
    ("paligemma", masks(PREFIXED), prefix),
  ):
    found = masking_utils.create_causal_mask(
      **how, block_sequence_ids=torch.where(same == 1, 0, -1)
    )
    out[name] = shown(found)
  return {"types": TYPES, "prefixed": PREFIXED, "window": WINDOW, "masks": out}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--to", type=pathlib.Path, default=FILE)
  args = parser.parse_args()
  args.to.write_text(json.dumps(make(), indent=1) + "\n")


if __name__ == "__main__":
  main()
