"""Random models that we and llama.cpp store as every type of GGUF files."""

import dataclasses
import pathlib
import zlib

import families
import gguf
import llama
import make_models
import numpy as np

# Every matrix of one type, which llama.cpp calls pure.
PURE = (
  *("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"),
  *("Q3_K", "Q4_K", "Q5_K"),
)
MIXED = (
  *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S"),
  *("Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
)
KINDS = (*PURE, *MIXED)
# llama.cpp takes Q2_K_S with importances alone, and others ignore them.
WEIGHED = (
  *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K_S"),
  *(kind for kind in MIXED if not kind.startswith("TQ")),
)
# llama.cpp reads it, but its quantizer has no number for it.
READ_ALONE = "NVFP4"


def sized(width, heads, kv_heads, head, hidden, layers, tied=False, of=None):
  """Returns a llama of these sizes, or another family."""
  of = of or families.FAMILIES["llama"]
  config = of.config | dict(
    hidden_size=width,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=head,
    intermediate_size=hidden,
    num_hidden_layers=layers,
    tie_word_embeddings=tied,
  )
  return dataclasses.replace(of, config=config, shards=1)


def experts(name: str, **config) -> families.Family:
  of = families.FAMILIES[name]
  return dataclasses.replace(of, config=of.config | config)


MIXTRAL = experts("mixtral", num_local_experts=8)
QWEN = experts("qwen3_moe", mlp_only_layers=[], moe_intermediate_size=256)
SHAPES = {
  "wide": sized(256, 8, 2, 32, 256, 16),  # four queries a key
  "odd": sized(320, 4, 2, 80, 200, 8, tied=True),  # blocks do not fit
  "deep": sized(256, 4, 1, 8, 32, 80),  # what llama.cpp takes for 70B
  "eight": sized(256, 8, 4, 32, 256, 8, of=MIXTRAL),  # a rule of their own
  "seven": sized(256, 8, 4, 32, 256, 8, of=QWEN),
}
CASES = {
  "wide": KINDS,
  "odd": KINDS,
  "deep": ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_M", "IQ4_XS"),
  "eight": ("Q8_0", "Q2_K", "Q3_K_M", "Q3_K_L", "Q4_K_M", "Q6_K", "IQ4_NL"),
  "seven": ("Q2_K", "Q4_K_M", "Q6_K"),
}


def weights(shape: families.Family) -> dict[str, np.ndarray]:
  """Returns matrices with long tails, that keep a signal's size."""
  out = {}
  for name, x in make_models.weights(shape).items():
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if x.ndim > 1:
      x = generator.laplace(scale=(2 * x.shape[-1]) ** -0.5, size=x.shape)
    out[name] = x.astype(np.float32)
  return out


def importances(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns some of every matrix but both ends'."""
  out = {}
  for tensor in gguf.GGUFReader(path).tensors:
    if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
      generator = np.random.default_rng(zlib.crc32(tensor.name.encode()))
      columns = int(tensor.shape[0])
      out[tensor.name] = 10 * generator.random(columns, np.float32) ** 4
  return out


@dataclasses.dataclass(frozen=True)
class Files:
  """Where one model lies, in fp32 and as what both programs made of it."""

  folder: pathlib.Path

  @property
  def plain(self) -> pathlib.Path:
    return self.folder / "F32.gguf"

  def ours(self, kind: str, weighed: bool = False) -> pathlib.Path:
    return self.folder / f"{kind}{'.i' * weighed}.gguf"

  def theirs(self, kind: str, weighed: bool = False) -> pathlib.Path:
    """Returns what llama.cpp makes of the fp32 file, by our file's number."""
    to = self.folder / f"{kind}{'.i' * weighed}.theirs.gguf"
    if not to.exists():
      ours = gguf.GGUFReader(self.ours(kind, weighed))
      number = ours.get_field("general.file_type").contents()
      given = importances(self.plain) if weighed else None
      llama.quantize(self.plain, to, number, kind in PURE, given)
    return to
