"""Writes PEFT's adapters of the tiny vision language models' language models.

  .venv-peers/bin/python tests/golden/make_vlm_peft.py [--to DIR] [NAME ...]

Each folder of `vlm_peft/` is an adapter as PEFT saves it over the family of
`vlm/` (see make_vlm.py); its factors are drawn by name. Beside it logits.npz:
those of the golden's rows by the adapted model, from fp64, fp32 [B, T, V].
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np
import peft
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_models  # noqa: E402
import make_peft  # noqa: E402
import make_vlm  # noqa: E402
import vlm_weights  # noqa: E402

TO = pathlib.Path(__file__).parent / "vlm_peft"

TARGETS = {
  "llava": r".*language_model\..*\.(q_proj|v_proj|down_proj)",
  "smolvlm": r".*text_model\..*\.(k_proj|o_proj)",
  "paligemma": r"model\.language_model\..*\.(q_proj|up_proj)|lm_head",
  "gemma3": [
    f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 2)
  ],
  "internvl": r".*language_model\..*\.gate_proj",
}
"""target_modules: without the first part they would mean the encoder's, too."""


def adapted(name: str, model: torch.nn.Module) -> peft.PeftModel:
  """Returns a model under a new adapter, whose factors are drawn by name."""
  config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS[name])
  wrapped = peft.get_peft_model(model, config)
  for key, value in wrapped.named_parameters():
    if "lora_" in key:
      drawn = vlm_weights.draw(f"{name}/{key}", tuple(value.shape))
      value.data = torch.from_numpy(drawn).double()
  return wrapped.double().eval()


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("names", nargs="*", default=list(TARGETS))
  parser.add_argument("--to", type=pathlib.Path, default=TO)
  args = parser.parse_args()
  for name in args.names or TARGETS:
    with tempfile.TemporaryDirectory() as made, torch.no_grad():
      wrapped = adapted(name, make_vlm.build(name, pathlib.Path(made)))
      with make_models.float64():
        found = make_vlm.generative(wrapped, make_vlm.FAMILIES[name], name)
    folder = args.to / name
    wrapped.float().save_pretrained(folder)
    make_peft.settle(folder, f"../../vlm/{name}")
    logits = np.asarray(found["logits"]).astype(np.float32)
    np.savez_compressed(folder / "logits.npz", logits=logits)
    print(name, logits.shape, float(np.abs(logits).max()))


if __name__ == "__main__":
  main()
