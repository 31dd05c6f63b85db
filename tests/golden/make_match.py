"""Writes peft_match.json: which modules PEFT adapts, and with which rank.

  .venv-peers/bin/python tests/golden/make_match.py

Each case holds the fields of adapter_config.json, and for every module that
PEFT adapts its rank and alpha, asked of PEFT's own functions.
"""

import json
import pathlib

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

LINEARS = [
  *(f"self_attn.{x}_proj" for x in "qkvo"),
  *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
]
MODULES = [
  *(f"model.layers.{i}.{x}" for i in range(12) for x in LINEARS),
  "model.embed_tokens",
  "lm_head",
]
QV = ["q_proj", "v_proj"]
CASES = [
  dict(target_modules=QV),
  dict(target_modules=["proj"]),  # a suffix counts from a dot on
  dict(target_modules=["self_attn.q_proj", "lm_head", "embed_tokens"]),
  dict(target_modules=[r".*q_proj"]),  # in a list never a pattern
  dict(target_modules=r".*q_proj"),
  dict(target_modules=r"q_proj"),
  dict(target_modules=r"model\.layers\.[02]\..*(q|down)_proj"),
  dict(target_modules=QV, exclude_modules=["layers.3.self_attn.q_proj"]),
  dict(target_modules=QV, exclude_modules=r".*\.1\..*"),
  dict(target_modules=QV, exclude_modules=["model.layers.0.self_attn.v_proj"]),
  dict(target_modules=QV, layers_to_transform=1),
  dict(target_modules=QV, layers_to_transform=[1, 11]),
  dict(target_modules=QV, layers_to_transform=[]),
  dict(target_modules=QV, layers_to_transform=[1], layers_pattern="layers"),
  dict(
    target_modules=QV, layers_to_transform=[1], layers_pattern=["h", "layers"]
  ),
  dict(target_modules=QV, layers_to_transform=[1], layers_pattern="h"),
  dict(
    target_modules=["q_proj", "model.layers.5.mlp.up_proj", "lm_head"],
    layers_to_transform=[0],
  ),
  dict(target_modules=QV, rank_pattern={"q_proj": 2, "v_proj": 3}),
  dict(target_modules=QV, rank_pattern={"layers.1.self_attn.q_proj": 2}),
  dict(target_modules=QV, rank_pattern={"1.self_attn.q_proj": 2}),
  dict(target_modules=QV, rank_pattern={"proj": 2, ".*proj": 5}),
  dict(target_modules=QV, rank_pattern={"^model.layers.1.*": 2, "v_proj": 5}),
  dict(target_modules=QV, rank_pattern={"^layers.1.*": 2}),
  dict(target_modules=QV, rank_pattern={"q_proj|v_proj": 7}),
  dict(
    target_modules=QV,
    rank_pattern={"q_proj": 2},
    alpha_pattern={"v_proj": 5, r"layers\.(0|10)\.self_attn\.q_proj": 6},
  ),
]


def adapted(case: dict) -> dict[str, list[int]]:
  """Returns {module: [rank, alpha]} as PEFT decides it."""
  config, out = LoraConfig(r=8, lora_alpha=16, **case), {}
  ranks, alphas = config.rank_pattern, config.alpha_pattern
  for name in MODULES:
    if check_target_module_exists(config, name):
      rank = ranks.get(get_pattern_key(ranks.keys(), name), config.r)
      alpha = alphas.get(get_pattern_key(alphas.keys(), name), 16)
      out[name] = [rank, alpha]
  return out


def main() -> None:
  cases = [dict(fields=case, adapted=adapted(case)) for case in CASES]
  to = pathlib.Path(__file__).with_name("peft_match.json")
  to.write_text(
    json.dumps(dict(modules=MODULES, cases=cases), separators=(",", ":")) + "\n"
  )
  for case in cases:
    print(len(case["adapted"]), case["fields"])


if __name__ == "__main__":
  main()
