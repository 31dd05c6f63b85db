"""Fields of config.json live: each is applied as transformers does, or refused.

Every field of a family's configuration class, and those that other families
have, gets another value. If what transformers computes with the same weights
changes, so must our model, and only then; or the field is refused by name.
"""

import json

import families
import numpy as np
import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

CHANGES = dict(
  attention_bias=True,
  mlp_bias=True,
  attention_dropout=0.5,
  attn_logit_softcapping=0.5,
  final_logit_softcapping=0.5,
  query_pre_attn_scalar=2,
  hidden_act="relu",
  hidden_activation="relu",
  layer_types=["full_attention", "sliding_attention"],
  sliding_window=3,
  use_sliding_window=True,
  max_window_layers=1,
  rms_norm_eps=0.1,
  rope_theta=10.0,
  rope_local_base_freq=10.0,
  partial_rotary_factor=0.5,
  initializer_range=0.5,
  pretraining_tp=2,
  use_cache=False,
  norm_topk_prob=True,
  num_experts_per_tok=1,
  router_jitter_noise=0.1,
  router_aux_loss_coef=0.5,
  use_bidirectional_attention=True,
  clip_qkv=0.1,
  logits_scaling=2.0,
  embedding_multiplier=2.0,
)
KINDS = (
  *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
  *("gemma", "gemma2", "gemma3"),
)
READ = """
import json, sys
from research.errors import UserError
from research.interop.hf import config
from research.nn import presets

def model(values):
  try:
    return presets.transformer(*config.sizes_from_config(values))
  except UserError as error:
    return str(error)

plain, *changed = map(model, json.load(open(sys.argv[1])))
assert not isinstance(plain, str), plain
print(json.dumps([x if isinstance(x, str) else x != plain for x in changed]))
"""


def config_of(kind, **changes):
  return families.FAMILIES[kind].config | {"num_hidden_layers": 2} | changes


def logits(values, weights=None):
  """Returns (logits, weights) of a config.json; those given if they fit."""
  kind = CONFIG_MAPPING[values["model_type"]]
  config = kind(**{k: v for k, v in values.items() if k != "model_type"})
  config._attn_implementation = config._experts_implementation = "eager"
  torch.manual_seed(0)
  model = AutoModelForCausalLM.from_config(config).eval()
  if weights is None:
    weights = {
      k: torch.randn(x.shape) * 0.4 for k, x in model.state_dict().items()
    }
  model.load_state_dict(weights, strict=True)
  with torch.no_grad():
    return model(torch.arange(24)[None] % 32).logits.numpy(), weights


@pytest.mark.parametrize("kind", KINDS)
def test_each_field_is_applied_as_it_is_there_or_refused(
  kind, heptad, tmp_path
):
  plain = config_of(kind)
  want, weights = logits(plain)
  cases = [plain] + [config_of(kind, **{k: v}) for k, v in CHANGES.items()]
  (tmp_path / "cases.json").write_text(json.dumps(cases))
  said = json.loads(heptad.script(READ, tmp_path / "cases.json"))
  wrong = []
  for (field, value), ours in zip(CHANGES.items(), said, strict=True):
    if isinstance(ours, str):
      assert field in ours, ours
      continue
    try:
      got, _ = logits(config_of(kind, **{field: value}), weights)
      theirs = not np.allclose(got, want, atol=1e-5)
    except RuntimeError:  # other weights
      theirs = True
    except (AttributeError, TypeError):  # it cannot compute such a model
      continue
    if theirs != ours:
      wrong.append(f"{field}: changes theirs {theirs}, ours {ours}")
  assert not wrong, "\n".join(wrong)
