"""Converts a model between our checkpoints and everybody's formats.

  python -m experiments.convert --from=smollm2-135m --to=DIR --format=hf
  python -m experiments.convert --from=DIR --to=model.gguf --format=gguf:Q8_0
  python -m experiments.convert --from=runs/quickstart --to=DIR --format=peft
  python -m experiments.convert --from=runs/quickstart --to=DIR --format=hf

--from takes what --model= takes elsewhere, and a run whose whole model was
trained. Formats without adapters merge them in float32, say what rounding lost,
and refuse to lose more than a tenth of the update unless --lossy.
experiments.adapters combines, converts and examines adapters.

gguf:TYPE is a type for every matrix (F32, F16, BF16, Q8_0, Q5_0, Q5_1, Q4_0,
Q4_1, Q3_K, Q4_K, Q5_K, MXFP4, NVFP4), or one of llama.cpp's mixtures (Q2_K,
Q2_K_S, Q3_K_S, Q3_K_M, Q3_K_L, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K, IQ4_NL,
IQ4_XS, TQ1_0, TQ2_0). Rows that blocks do not divide are refused; with
--fallback they are stored as llama.cpp stores them, and listed. --imatrix
weighs errors by importances, from experiments.imatrix or from llama.cpp.

Of other tools' quantized directories (gptq, awq, bnb, compressed-tensors),
matrices that the tool can hold as they are lose nothing; with --requantize the
others are rounded to nearest, and each one's errors said.

  python -m experiments.convert --from=GPTQ --to=DIR --format=awq
  python -m experiments.convert --from=smollm2-135m --to=DIR \\
    --format=gptq:4 --group_size=64 --requantize

With --mask_token an autoregressive model becomes a masked diffusion model (hf,
orbax): its weights stay, and config.json says how. With --block=1 it generates
what it generated before; otherwise it has to be trained.

  python -m experiments.convert --from=smollm2-135m --to=DIR --format=hf \\
    --mask_token=new

The last line on stdout is JSON: tensors, changed, types, errors, merges. Of
adapters' updates merge_kept is the share that is left, merge_loss the rest of
1, and merge_noise the size of what rounding adds, on average nothing.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

from collections.abc import Sequence
from typing import Any

from experiments.converting import formats, quantized
from experiments.core import cli, runtime
from experiments.core.choices import Choice, Choices

FORMATS = Choices(
  "format",
  "What to write.",
  {
    "hf": Choice(formats.HuggingFace),
    "gguf": Choice(formats.Gguf),
    "peft": Choice(formats.Peft),
    "gguf-adapter": Choice(formats.GgufAdapter),
    "orbax": Choice(formats.Orbax),
    "gptq": Choice(quantized.Gptq),
    "awq": Choice(quantized.Awq),
    "bnb": Choice(quantized.BitsAndBytes),
    "compressed-tensors": Choice(quantized.CompressedTensors),
  },
)

FLAGS = cli.new_flags()
FORMATS.define(FLAGS)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Converts; returns the result, which the command prints as JSON."""
  del argv
  flags = ("from", "to", "format")
  cli.required(**{name: FLAGS[name].value for name in flags})
  conversion = FORMATS.chosen(FLAGS)
  runtime.setup()
  return conversion.run() | {"format": FLAGS["format"].value}


if __name__ == "__main__":
  cli.run(main)
