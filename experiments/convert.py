"""Converts a model between our checkpoints and the formats of other tools.

  python -m experiments.convert --from=smollm2-135m --to=DIR --format=hf
  python -m experiments.convert --from=DIR --to=model.gguf --format=gguf:Q8_0
  python -m experiments.convert --from=runs/quickstart --to=DIR --format=peft
  python -m experiments.convert --from=runs/quickstart --to=DIR --format=hf

--from accepts what --model= of other commands accepts. For formats without
adapters, adapters are merged in float32; the command reports what rounding lost
and, without --lossy, fails if it is more than a tenth of the update. To
combine, convert and examine adapters, use experiments.adapters.

gguf:TYPE is a type for every matrix (F32, F16, BF16, Q8_0, Q5_0, Q5_1, Q4_0,
Q4_1, Q3_K, Q4_K, Q5_K, MXFP4, NVFP4), or one of llama.cpp's mixtures (Q2_K,
Q2_K_S, Q3_K_S, Q3_K_M, Q3_K_L, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K, IQ4_NL,
IQ4_XS, TQ1_0, TQ2_0). A matrix whose rows are not a multiple of the block size
is an error; with --fallback it is stored as llama.cpp does, and listed.
--imatrix is an importance matrix, of experiments.imatrix or of llama.cpp.

For gptq, awq, bnb and compressed-tensors, matrices that the format can
represent exactly are converted without loss. Others are an error; with
--requantize they are rounded to nearest, and the command reports each one's
error.

  python -m experiments.convert --from=GPTQ --to=DIR --format=awq
  python -m experiments.convert --from=smollm2-135m --to=DIR \\
    --format=gptq:4 --group_size=64 --requantize

--mask_token turns an autoregressive model into a masked diffusion model (hf,
orbax). Its weights stay the same; config.json gets the mask settings. With
--block=1 it generates the same text as before; otherwise it must be trained.

  python -m experiments.convert --from=smollm2-135m --to=DIR --format=hf \\
    --mask_token=new

The last line on stdout is JSON: tensors, changed, types, errors, merges. After
merging, merge_kept is the share of the update that is left, merge_loss the
share that rounding lost, and merge_noise the size of the rounding noise.
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.converting import formats, quantized
from experiments.core import cli, runtime
from experiments.core.choices import Choice, Choices
from research.io import folders

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
  cli.model(FLAGS["from"].value)
  conversion = FORMATS.chosen(FLAGS)
  folders.check_free(pathlib.Path(conversion.to))
  cli.existing("imatrix", filter(None, [FLAGS["imatrix"].value]))
  runtime.setup()
  return conversion.run() | {"format": FLAGS["format"].value}


if __name__ == "__main__":
  cli.run(main)
