"""What stands in adapter_config.json beside a method, or has no place there."""

import pytest

from research.interop.peft import config as peft_config
from research.lora.methods.ia3 import IA3
from research.lora.methods.lora import LoRA
from research.typing import UserError

MODULE = "model.layers.0.mlp.up_proj"
ROWS = {"model.embed_tokens": (3, 1)}


def config(method, **beside):
  methods = {MODULE: method}
  return peft_config.make_config(methods, [MODULE], "base", **beside)


def test_lora_has_biases_and_rows_of_tokens_beside_it():
  found = config(LoRA(rank=2), bias="lora_only", rows=ROWS)
  assert found["bias"] == "lora_only"
  assert found["trainable_token_indices"] == {"model.embed_tokens": [3, 1]}
  assert "trainable_token_indices" not in config(LoRA(rank=2))
  # Older versions of PEFT do not know this field.
  assert "ensure_weight_tying" not in found
  assert config(LoRA(rank=2), tied=True)["ensure_weight_tying"] is True


@pytest.mark.parametrize(
  ("beside", "words"),
  [
    (dict(rows=ROWS), "cannot combine trained token rows with IA3"),
    (dict(bias="all"), "biases were trained, which PEFT's IA3 cannot store"),
  ],
)
def test_another_method_has_nothing_beside_it(beside, words):
  with pytest.raises(UserError, match=words):
    config(IA3(), **beside)
  assert not {"bias", "trainable_token_indices"} & set(config(IA3()))


@pytest.mark.parametrize("every", [True, False])
def test_ia3s_feedforward_modules_are_among_its_targets(every):
  """PEFT 0.21.2 refuses a configuration where they are not."""
  layers = [f"model.layers.{i}.mlp" for i in range(2)]
  modules = [f"{m}.{n}_proj" for m in layers for n in ("up", "down")]
  adapted = modules if every else modules[:2]
  methods = {m: IA3().for_matrix(m, {}) for m in adapted}
  found = peft_config.make_config(methods, modules, "base")
  targets = found["target_modules"]
  by_input = {m for m in adapted if methods[m].by_input}
  assert by_input == {m for m in adapted if m.endswith("down_proj")}
  assert set(found["feedforward_modules"]) <= set(targets)
  assert by_input == {
    m for m in adapted if m.endswith(tuple(found["feedforward_modules"]))
  }
