"""gptqmodel's side of the comparisons, as a process: it patches what it finds.

  PYTHONPATH=.venv-peers/gptqmodel .venv-peers/bin/python \\
    tests/peers/gptqmodel_side.py open OUT MODEL...
  ... quantize FROM TO METHOD

`open` has transformers open each model in float32 and leaves at OUT/NAME.npz,
of the tokens in OUT/rows.npz, its logits, a greedy continuation, and every
matrix that its kernels decode. `quantize` is gptqmodel's own, with few and
random tokens.
"""

import json
import os
import pathlib
import sys

# Of one processor it makes one worker, and then asks for two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
# Else it compiles, for half a minute, what is decoded a few times.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import gptqmodel
import numpy as np
import tokenizers
import torch
import transformers
from gptqmodel.nn_modules import qlinear
from gptqmodel.quantization import awq

VOCAB = 67

# Others that it would choose are compiled for minutes, for AVX-512.
KERNELS = {
  "gptq": transformers.GPTQConfig(bits=4, backend="torch"),
  "awq": transformers.AwqConfig(backend="torch_awq"),
}


def decoded(module) -> torch.Tensor:
  """Returns a matrix as its products take it, [inputs, outputs]."""
  if not isinstance(module, qlinear.AWQuantLinear):
    return module.dequantize_weight()
  return awq.utils.packing_utils.dequantize_gemm(
    qweight=module.qweight,
    qzeros=module.qzeros,
    scales=module.scales,
    bits=module.bits,
    group_size=module.group_size,
  )


@torch.no_grad()
def opened(folder: pathlib.Path, rows) -> dict[str, np.ndarray]:
  said = json.loads((folder / "config.json").read_text())
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder,
    attn_implementation="eager",
    dtype=torch.float32,
    device_map="cpu",
    # Only how it computes is taken from here; what it reads says the rest.
    quantization_config=KERNELS[said["quantization_config"]["quant_method"]],
  ).eval()
  model.generation_config.eos_token_id = None  # all steps are wanted
  tokens = torch.from_numpy(rows["tokens"]).long()
  prompt = torch.from_numpy(rows["prompt"]).long()[None]
  more = model.generate(
    prompt,
    max_new_tokens=int(rows["steps"]),
    do_sample=False,
    pad_token_id=0,
  )
  out = {
    f"weights/{name}": decoded(module).numpy()
    for name, module in model.named_modules()
    if isinstance(module, qlinear.BaseQuantLinear)
  }
  out["tokens"] = more[0, prompt.shape[1] :].numpy()
  out["logits"] = model(tokens).logits.float().numpy()
  return out


def quantize(source: str, to: str, method: str) -> None:
  """Leaves the tokenizer, which it needs, beside the source."""
  words = tokenizers.models.WordLevel(
    {f"w{i}": i for i in range(VOCAB)}, unk_token="w0"
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(words),
    bos_token="w1",
    eos_token="w2",
    pad_token="w0",
  ).save_pretrained(source)
  how = {
    "gptq": dict(desc_act=True, sym=False, format="gptq_v2"),
    "awq": dict(sym=True, format="gemm"),
  }
  config = gptqmodel.QuantizeConfig(
    bits=4,
    group_size=32,
    quant_method=method,
    offload_to_disk=False,
    **how[method],
  )
  model = gptqmodel.GPTQModel.load(source, config, device="cpu")
  rows = np.random.default_rng(1).integers(3, VOCAB, (16, 64)).tolist()
  data = [dict(input_ids=row, attention_mask=[1] * 64) for row in rows]
  model.quantize(data, batch_size=1)
  model.save(to)


def main() -> None:
  torch.set_num_threads(1)
  if sys.argv[1] == "quantize":
    quantize(*sys.argv[2:])
    return
  out = pathlib.Path(sys.argv[2])
  rows = dict(np.load(out / "rows.npz"))
  for folder in map(pathlib.Path, sys.argv[3:]):
    np.savez(out / f"{folder.name}.npz", **opened(folder, rows))


if __name__ == "__main__":
  main()
