"""Converts a model between our checkpoints and everybody's formats.

  python -m experiments.convert --from=smollm2-135m --to=DIR --format=hf
  python -m experiments.convert --from=DIR --to=model.gguf --format=gguf:Q8_0
  python -m experiments.convert --from=runs/quickstart --to=DIR --format=peft
  python -m experiments.convert --from=runs/quickstart --to=DIR --format=hf

--from takes what --model= takes elsewhere, and a run whose whole model was
trained. Formats: hf (safetensors), gguf or gguf:TYPE (see below; without a
type each tensor keeps its own), peft (an adapter), gguf-adapter or
gguf-adapter:TYPE (an adapter for llama.cpp; F32, F16, BF16), orbax (our
checkpoint: every bit, adapters and packed weights included).
hf and gguf merge adapters in float32, say what rounding lost, and refuse to
lose more than a tenth of the update unless --lossy. experiments.adapters
combines, converts and examines adapters.

gguf:TYPE is a type for every matrix (F32, F16, BF16, Q8_0, Q5_0, Q5_1, Q4_0,
Q4_1, Q3_K, Q4_K, Q5_K, MXFP4, NVFP4), or one of llama.cpp's mixtures (Q2_K,
Q2_K_S, Q3_K_S, Q3_K_M, Q3_K_L, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K, IQ4_NL,
IQ4_XS, TQ1_0, TQ2_0). Rows that blocks do not divide are refused; with
--fallback they are stored as llama.cpp stores them, and listed. --imatrix
weighs errors by importances, from experiments.imatrix or from llama.cpp.

gptq[:BITS], awq, bnb[:nf4, fp4 or int8] and compressed-tensors[:int4, int8,
fp8, nvfp4 or mxfp4] are other tools' quantized directories. Matrices that such
a tool can hold as they are lose nothing; with --requantize the others are
rounded to nearest, and each one's errors said.

  python -m experiments.convert --from=GPTQ --to=DIR --format=awq
  python -m experiments.convert --from=smollm2-135m --to=DIR \\
    --format=gptq:4 --group_size=64 --requantize

With --mask_token a model that predicts the next token becomes one that fills in
masks (hf, orbax): its weights stay, and config.json says how. With --block=1
it writes what it wrote before; otherwise it has to be trained.

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

import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.core import cli, runtime

FLAGS = cli.new_flags()

FORMATS = ("hf", "gguf", "peft", "gguf-adapter", "orbax")
QUANTIZED = {
  "gptq": ("2", "3", "4", "8"),
  "awq": (),
  "bnb": ("nf4", "fp4", "int8"),
  "compressed-tensors": ("int4", "int8", "fp8", "nvfp4", "mxfp4"),
}
"""Formats of other tools -> what they may be of, behind a colon."""

_FROM = flags.DEFINE_string(
  "from",
  None,
  "A Hugging Face directory, a PEFT adapter's, a run's working directory, a "
  "checkpoint of ours, a .gguf file, or the name smollm2-135m.",
  flag_values=FLAGS,
)
_TO = flags.DEFINE_string(
  "to",
  None,
  "The directory (for gguf the file) to write; it must not exist yet.",
  flag_values=FLAGS,
)
_FORMAT = flags.DEFINE_string(
  "format",
  None,
  "hf, gguf, gguf:TYPE, peft, gguf-adapter, gguf-adapter:TYPE, orbax, "
  "gptq[:BITS], awq, bnb[:TYPE] or compressed-tensors[:TYPE].",
  flag_values=FLAGS,
)
_DTYPE = flags.DEFINE_string(
  "dtype",
  None,
  "For hf, and for what other tools' formats leave plain: float32, bfloat16 or "
  "float16; by default each tensor keeps its own.",
  flag_values=FLAGS,
)
_SHARD_SIZE = flags.DEFINE_string(
  "shard_size",
  "5GB",
  "For hf and other tools' formats: bytes a file, e.g. 500MB.",
  flag_values=FLAGS,
)
_REQUANTIZE = flags.DEFINE_bool(
  "requantize",
  False,
  "For other tools' formats: round matrices that do not fit to nearest.",
  flag_values=FLAGS,
)
_GROUP_SIZE = flags.DEFINE_integer(
  "group_size",
  None,
  "For other tools' integers: inputs that share a scale, 0 for all. By default "
  "those of most packed matrices; else 128, 64 or 32, what all have whole.",
  lower_bound=0,
  flag_values=FLAGS,
)
_FALLBACK = flags.DEFINE_bool(
  "fallback",
  False,
  "For gguf: store rows that blocks do not divide as llama.cpp does.",
  flag_values=FLAGS,
)
_IMATRIX = flags.DEFINE_string(
  "imatrix",
  None,
  "For gguf: a file of importances, which errors are weighed by.",
  flag_values=FLAGS,
)
_BASE = flags.DEFINE_string(
  "base",
  None,
  "For peft: the model that the adapter is for, if it does not say.",
  flag_values=FLAGS,
)
_RSLORA = flags.DEFINE_bool(
  "rslora",
  False,
  "For peft: state scales as alpha / sqrt(rank).",
  flag_values=FLAGS,
)
_ROUNDING = flags.DEFINE_enum(
  "rounding",
  "nearest",
  ["nearest", "stochastic"],
  "For hf: of merged weights. Stochastic keeps small updates on average.",
  flag_values=FLAGS,
)
_LOSSY = flags.DEFINE_bool(
  "lossy",
  False,
  "Merge even where most of the adapter's update is rounded away.",
  flag_values=FLAGS,
)
_MASK_TOKEN = flags.DEFINE_string(
  "mask_token",
  None,
  "For hf and orbax: the token that hides others, by its text or id, one that "
  "texts do not use; or new, for a row of its own.",
  flag_values=FLAGS,
)
_BLOCK = flags.DEFINE_integer(
  "block",
  None,
  "With --mask_token: tokens of a block, which sees itself and those before "
  "it. By default all tokens see each other.",
  lower_bound=1,
  flag_values=FLAGS,
)
_REPORT = flags.DEFINE_string(
  "report",
  None,
  "A JSON file that lists every tensor's type and errors.",
  flag_values=FLAGS,
)


def bytes_of(text: str) -> int:
  """Returns the number that `500MB`, `5GB` or `123` stands for."""
  from research.typing import UserError

  found = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?)B?", text.strip(), re.I)
  if not found or not int(found[1]):
    raise UserError(
      f"--shard_size={text}: expected a number of bytes such as 500MB or 5GB"
    )
  power = " KMGT".index(found[2].upper() or " ")
  return int(found[1]) * (1024 if found[3] else 1000) ** power


def _target() -> tuple[str, str | None]:
  """Returns the format and what it is to be of, such as a type."""
  from research.typing import UserError

  name, colon, kind = _FORMAT.value.partition(":")
  typed = name.startswith("gguf") and kind
  typed = typed or kind in QUANTIZED.get(name, ())
  if name not in (*FORMATS, *QUANTIZED) or (colon and not typed):
    known = [*FORMATS, *QUANTIZED, "gguf:TYPE", "gguf-adapter:TYPE"]
    known += [f"{k}:{x}" for k, v in QUANTIZED.items() for x in v]
    raise UserError(
      f"--format={_FORMAT.value}: expected one of {', '.join(known)}"
    )
  hf = dict(dtype=_DTYPE, shard_size=_SHARD_SIZE)
  others = {
    ("hf",): dict(rounding=_ROUNDING),
    ("hf", "orbax"): dict(mask_token=_MASK_TOKEN, block=_BLOCK),
    ("hf", *QUANTIZED): hf,
    ("gguf",): dict(fallback=_FALLBACK, imatrix=_IMATRIX),
    ("peft",): dict(base=_BASE, rslora=_RSLORA),
    (*QUANTIZED,): dict(requantize=_REQUANTIZE, group_size=_GROUP_SIZE),
  }
  for owners, options in others.items():
    for option in options:
      if name not in owners and FLAGS[option].present:
        raise UserError(
          f"--{option}: is for --format={', '.join(owners)}, found "
          f"--format={name}"
        )
  return name, (kind.upper() if name.startswith("gguf") else kind) or None


def _writer(name: str, kind: str | None, source: Any) -> Any:
  """Returns what writes another tool's format."""
  from research.interop.quantized import checkpoint_formats, gptq

  group = _GROUP_SIZE.value
  if name == "gptq":
    before = source.origin.get("came_from", source.origin)
    said = before.get("quantization") or {}
    version = gptq.VERSIONS.get(said.get("checkpoint_format"), 1)
    # transformers opens no packed head, so only what came with one has one.
    head = said.get("lm_head") is True
    return checkpoint_formats.Gptq(
      kind and int(kind), group, version, head=head
    )
  if name == "awq":
    return checkpoint_formats.Awq(group)
  if name == "bnb":
    return checkpoint_formats.Bnb(kind)
  return checkpoint_formats.Compressed(kind or "int4", group)


def _recipe(kind: str | None) -> Any:
  """Returns what the matrices of a GGUF file are stored in."""
  from research.interop.gguf import imatrix
  from research.interop.gguf import recipe as gguf_recipe

  importances = None
  if _IMATRIX.value is not None:
    importances = imatrix.read(_IMATRIX.value).means()
  return gguf_recipe.Recipe(kind, _FALLBACK.value, importances)


def _rounding() -> Any:
  from research.lora.merge import changes, merge

  kinds = dict(nearest=changes.cast, stochastic=merge.StochasticRounding())
  return kinds[_ROUNDING.value]


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Converts; returns the result, which the command prints as JSON."""
  del argv
  cli.required(
    **{"from": _FROM.value, "to": _TO.value, "format": _FORMAT.value}
  )
  runtime.setup()
  import dataclasses
  import json

  from experiments.core import convert_sources
  from research.interop import convert, hf
  from research.training import memory
  from research.typing import UserError

  name, kind = _target()
  size = bytes_of(_SHARD_SIZE.value)
  if _DTYPE.value is not None and _DTYPE.value not in hf.DTYPES:
    raise UserError(
      f"--dtype={_DTYPE.value}: expected one of {', '.join(hf.DTYPES)}"
    )
  to, start = pathlib.Path(_TO.value), time.perf_counter()
  convert.check_free(to)
  recipe = _recipe(kind) if name == "gguf" else None
  source = convert_sources.source(_FROM.value)
  source = convert_sources.filling(source, _MASK_TOKEN.value, _BLOCK.value)
  if name == "gguf":
    log, reason, written = convert.to_gguf(source, to, recipe, _least())
    more = _said(written)
  else:
    log, reason, more = _written(name, kind, source, to, size), "", {}
  cli.say(log.table())
  if reason:
    cli.say(f"the tokenizer is not in the file: {reason}")
  if _REPORT.value is not None:
    rows = [dataclasses.asdict(c) for c in log.changes]
    pathlib.Path(_REPORT.value).write_text(
      json.dumps(cli.plain(rows), indent=1) + "\n"
    )
  return {
    **log.summary(),
    **more,
    "bytes": _size(to),
    "tokenizer": _has_tokenizer(name, source) and not reason,
    "from": _FROM.value,
    "to": _TO.value,
    "format": _FORMAT.value,
    "seconds": time.perf_counter() - start,
    "peak_memory_bytes": memory.peak_memory_bytes(),
  }


def _has_tokenizer(name: str, source: Any) -> bool:
  """Whether the source's tokenizer is written; an adapter's is its base's."""
  return source.tokenizer is not None and name not in ("peft", "gguf-adapter")


def _least() -> float | None:
  """Returns the share of an update that rounding must leave."""
  from research.lora.merge import changes

  return None if _LOSSY.value else changes.LEAST_KEPT


def _written(
  name: str, kind: str | None, source: Any, to: pathlib.Path, size: int
) -> Any:
  """Writes any format but gguf; returns the log of what changed.

  Args:
    name: the format.
    kind: what it is to be of.
    source: what to write.
    to: where.
    size: bytes a file.
  """
  from research.interop import convert

  if name == "hf":
    return convert.to_hf(source, to, _DTYPE.value, size, _rounding(), _least())
  if name == "gguf-adapter":
    return convert.to_gguf_adapter(source, to, kind or "F32")
  if name == "peft":
    return convert.to_peft(source, to, _BASE.value, _RSLORA.value)
  if name == "orbax":
    return convert.to_orbax(source, to)
  writer = _writer(name, kind, source)
  return convert.to_quantized(
    source, to, writer, _REQUANTIZE.value, _DTYPE.value, size, _least()
  )


def _said(written: Any) -> dict[str, Any]:
  """Prints what is otherwise than wanted; returns what JSON has."""
  if written.window is not None:
    cli.say(
      f"a window of {written.window} tokens is in the file, but llama.cpp has "
      "none in architecture 'llama': there each token sees all before it"
    )
  kinds: dict[str, list[str]] = {}
  for name, (want, have) in written.otherwise.items():
    kinds.setdefault(f"{want} -> {have}", []).append(name)
  for kind, names in kinds.items():
    cli.say(
      f"blocks do not divide the rows of {len(names)} tensors, {kind}: "
      f"{names[0]} ..."
    )
  return {
    "bits_per_weight": written.bits_per_weight,
    "fallbacks": {kind: len(names) for kind, names in kinds.items()},
  }


def _size(to: pathlib.Path) -> int:
  files = to.rglob("*") if to.is_dir() else [to]
  return sum(f.stat().st_size for f in files if f.is_file())


if __name__ == "__main__":
  cli.run(main)
