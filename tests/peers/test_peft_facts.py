"""peft_facts.json is what the PEFT installed says."""

import json

import make_models
import make_peft_facts
import numpy as np


def test_facts():
  file = make_models.MODELS.parent / "peft_facts.json"
  want, got = json.loads(file.read_text()), make_peft_facts.facts()
  assert (got["version"], got["types"]) == (want["version"], want["types"])
  for name, x in want["lora_ga"].items():
    np.testing.assert_allclose(got["lora_ga"][name], x, atol=2e-5, err_msg=name)
