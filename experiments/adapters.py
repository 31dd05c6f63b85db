"""Combines, converts and examines adapters.

  python -m experiments.adapters --op=svd --from=A --from=B --weight=0.7 \\
    --weight=0.3 --rank=8 --to=DIR
  python -m experiments.adapters --op=lora --from=A --energy=0.99 --to=DIR
  python -m experiments.adapters --op=diagnose --from=A --picture=a.png
  python -m experiments.adapters --op=fidelity --from=A --dtype=bfloat16 \\
    --text=README.md

--op, of adapters over one base, written to --to in PEFT's format:

  cat, svd, linear, ties, ties_svd, dare_linear, dare_linear_svd, dare_ties,
  dare_ties_svd, magnitude_prune, magnitude_prune_svd: a weighted sum, as PEFT's
    add_weighted_adapter. cat is exact; cat of one adapter is a copy of it.
  lora: any method as plain LoRA, by --rank or --energy.
  intruders: weakens leading singular vectors that the base does not know.

and of one adapter, writing nothing but --picture, --report, and for merge --to:

  diagnose: size, ranks, angles and intruders of each update.
  fidelity: what merging into --dtype would lose, of weights and of logits.
  validate: rules of adapter_config.json that match nothing or overlap.
  merge: what merging over a packed base does to logits on --text, by mode:
    decoded, requantized in the base's format, or into --original, the model
    that it was rounded from. --mode and --to write one, as our checkpoint.
    --from is a run, whose config.gin packs the base again, or our checkpoint:
    an adapter's directory does not say how its base was packed.

--from takes PEFT's directories, runs' working directories, and llama.cpp's
.gguf adapters together with --base. The last line on stdout is JSON.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments.core import cli, runtime

FLAGS = cli.new_flags()

_OP = flags.DEFINE_string(
  "op", None, "What to do; see above.", flag_values=FLAGS
)
_FROM = flags.DEFINE_multi_string(
  "from", [], "An adapter; may be given several times.", flag_values=FLAGS
)
_BASE = flags.DEFINE_string(
  "base", None, "The model that a .gguf adapter is for.", flag_values=FLAGS
)
_WEIGHT = flags.DEFINE_multi_float(
  "weight",
  [],
  "Of each adapter in turn; 1 each if left out.",
  flag_values=FLAGS,
)
_TO = flags.DEFINE_string(
  "to", None, "The directory to write; it must not exist.", flag_values=FLAGS
)
_RANK = flags.DEFINE_integer(
  "rank", None, "Of what is decomposed.", flag_values=FLAGS
)
_ENERGY = flags.DEFINE_float(
  "energy",
  None,
  "For lora: share of an update's squared norm to keep, instead of --rank. For "
  "diagnose: the share that counts, 0.9 by default.",
  flag_values=FLAGS,
)
_DENSITY = flags.DEFINE_float(
  "density", 1.0, "Share of the entries that is kept.", flag_values=FLAGS
)
_ELECT = flags.DEFINE_enum(
  "elect",
  "total",
  ["total", "frequency"],
  "How ties elect a sign: by the sum of the entries, or by their number.",
  flag_values=FLAGS,
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Of entries dropped at random, and of rounding.", flag_values=FLAGS
)
_TOP = flags.DEFINE_integer(
  "top", 10, "Leading singular vectors looked at.", flag_values=FLAGS
)
_THRESHOLD = flags.DEFINE_float(
  "threshold", 0.5, "An intruder's largest cosine.", flag_values=FLAGS
)
_STRENGTH = flags.DEFINE_float(
  "strength", 0.75, "What is left of an intruder.", flag_values=FLAGS
)
_DTYPE = flags.DEFINE_string(
  "dtype",
  None,
  "For fidelity: of merged weights; by default the base's own.",
  flag_values=FLAGS,
)
_ROUNDING = flags.DEFINE_enum(
  "rounding",
  "nearest",
  ["nearest", "stochastic"],
  "For fidelity: of merged weights.",
  flag_values=FLAGS,
)
_TEXT = flags.DEFINE_string(
  "text",
  None,
  "For fidelity and merge: a text on whose tokens logits are compared.",
  flag_values=FLAGS,
)
_TOKENS = flags.DEFINE_integer(
  "tokens", 256, "For these: how many of them.", flag_values=FLAGS
)
_ORIGINAL = flags.DEFINE_string(
  "original",
  None,
  "For merge: the model that the base was rounded from.",
  flag_values=FLAGS,
)
_MODE = flags.DEFINE_enum(
  "mode",
  "decoded",
  ["decoded", "requantized", "original"],
  "For merge with --to: which one.",
  flag_values=FLAGS,
)
_PICTURE = flags.DEFINE_string(
  "picture", None, "For diagnose: a PNG to draw.", flag_values=FLAGS
)
_REPORT = flags.DEFINE_string(
  "report", None, "A JSON file with a row a matrix.", flag_values=FLAGS
)


def _opened(name: str) -> Any:
  """Returns an adapter as a source that knows its base."""
  from research.interop import sources
  from research.interop.peft import gguf_adapter
  from research.typing import UserError

  path = pathlib.Path(name)
  if path.suffix == ".gguf":
    cli.required(base=_BASE.value)
    base = sources.open_source(_BASE.value)
    params = gguf_adapter.load(path, base.params(), base.model)
    origin = dict(format="gguf-adapter", path=name)
    return sources.with_params(base, base.model, params, origin, _BASE.value)
  source = sources.open_source(name)
  if source.base is None:
    raise UserError(f"--from={name}: found a model, expected an adapter")
  return source


def _one() -> Any:
  from research.typing import UserError

  if len(_FROM.value) != 1:
    raise UserError(
      f"--op={_OP.value}: found {len(_FROM.value)} adapters, expected one"
    )
  return _opened(_FROM.value[0])


def _combined() -> tuple[Any, Any, dict[str, Any]]:
  """Returns the first source, the tree with the sum, and the result."""
  import jax

  from research.interop import convert, parts
  from research.lora import lora_factors, wrap
  from research.lora.merge import arithmetic
  from research.typing import UserError

  found = [_opened(name) for name in _FROM.value]
  for name, source in zip(_FROM.value, found, strict=True):
    if source.base.origin["path"] != found[0].base.origin["path"]:
      raise UserError(
        f"--from={name}: its base is {source.base.origin['path']}, expected "
        f"{found[0].base.origin['path']} as the first adapter's"
      )
    under = parts.from_params(wrap.disable(source.params()))
    if len(found) > 1 and convert.differing(under, source.base):
      raise UserError(
        f"--from={name}: brings weights of the base whole, which cannot be "
        "summed; expected adapters alone"
      )
  summed = arithmetic.add_weighted(
    [lora_factors.factors(source.params()) for source in found],
    _WEIGHT.value or [1.0] * len(found),
    _OP.value,
    rank=_RANK.value,
    density=_DENSITY.value,
    elect=_ELECT.value,
    key=jax.random.key(_SEED.value),
  )
  params = lora_factors.wrapped(wrap.disable(found[0].params()), summed)
  rows = {path: dict(rank=f.rank) for path, f in summed.items()}
  return found[0], params, _told(rows, ranks=[f.rank for f in summed.values()])


def _lora() -> tuple[Any, Any, dict[str, Any]]:
  from research.lora import to_lora
  from research.typing import UserError

  if (_RANK.value is None) == (_ENERGY.value is None):
    raise UserError("--op=lora: expected either --rank or --energy")
  size = (
    to_lora.Energy(_ENERGY.value)
    if _RANK.value is None
    else to_lora.Rank(_RANK.value)
  )
  source = _one()
  params, fits = to_lora.to_lora(source.params(), size)
  rows = {path: dataclasses.asdict(fit) for path, fit in fits.items()}
  worst = max(fits, key=lambda path: fits[path].error)
  told = _told(
    rows,
    ranks=[fit.rank for fit in fits.values()],
    error=fits[worst].error,
    worst=worst,
  )
  return source, params, told


def _intruders() -> tuple[Any, Any, dict[str, Any]]:
  from research.lora import lora_factors, wrap
  from research.lora.diagnosis import diagnose

  source = _one()
  params = source.params()
  found, counts = diagnose.mitigate(
    params, _TOP.value, _THRESHOLD.value, _STRENGTH.value
  )
  rows = {path: dict(intruders=n) for path, n in counts.items()}
  told = _told(rows, intruders=sum(counts.values()))
  return source, lora_factors.wrapped(wrap.disable(params), found), told


def _diagnosed() -> dict[str, Any]:
  import numpy as np

  from research.lora.diagnosis import diagnose, plot_diagnosis

  energy = 0.9 if _ENERGY.value is None else _ENERGY.value
  found = diagnose.diagnose(_one().params(), _TOP.value, energy)
  if _PICTURE.value is not None:
    plot_diagnosis.draw(found, _PICTURE.value, _FROM.value[0])
  n = _THRESHOLD.value
  rows = {
    path: dataclasses.asdict(d) | dict(intruders=d.intruders(n))
    for path, d in found.items()
  }
  names = ("relative", "stable_rank", "energy_rank", "intruders")
  means = {k: float(np.mean([r[k] for r in rows.values()])) for k in names}
  return _told(rows, means=means, picture=_PICTURE.value)


def _fidelity() -> dict[str, Any]:
  from research.lora.merge import changes, merging

  source = _one()
  params = source.params()
  kinds = dict(nearest=changes.cast, stochastic=merging.Stochastic(_SEED.value))
  merged, losses = merging.merge(params, kinds[_ROUNDING.value], _DTYPE.value)
  out = _told(
    {path: dataclasses.asdict(c) for path, c in losses.items()},
    least_kept=min(c.kept for c in losses.values()),
    **changes.merges(losses.values()),
  )
  if _TEXT.value is None:
    return out
  compared = merging.outputs(source.model, params, merged, _tokens(source))
  return out | dict(outputs=dataclasses.asdict(compared))


def _tokens(source: Any) -> Any:
  """Returns a row of the text's tokens."""
  import jax.numpy as jnp

  from research.typing import UserError

  text = cli.read_text(_TEXT.value, "text")
  if source.tokenizer is None:
    raise UserError(f"--from={_FROM.value[0]}: its base has no tokenizer")
  tokens = source.tokenizer.prompt(text)[: _TOKENS.value]
  return jnp.asarray([tokens], jnp.int32)


def _merged() -> dict[str, Any]:
  """Tells what each way to merge does; writes one if there is a --to."""
  from experiments.studies.lora import adapter_merges

  text, to, original = _TEXT.value, _TO.value, _ORIGINAL.value
  adapter_merges.check(_FROM.value, to, _MODE.value, original, text)
  rows, out = adapter_merges.merge(
    _FROM.value[0],
    to=to,
    mode=_MODE.value,
    original=original,
    tokens=None if text is None else _tokens,
  )
  _told(rows)
  return out


def _validated() -> dict[str, Any]:
  """Reads rules, not weights: rules can be wrong that no adapter has."""
  from research.interop import load, sources
  from research.interop.peft import (
    peft_names,
    peft_naming,
    peft_whole,
    validate,
  )
  from research.io import safetensors
  from research.typing import UserError

  if len(_FROM.value) != 1:
    raise UserError("--op=validate: expected one adapter")
  path = pathlib.Path(_FROM.value[0])
  folder = load.adapter_directory(path) if path.is_dir() else None
  if folder is None:
    raise UserError(f"--from={path}: expected a directory with an adapter")
  base = sources.open_source(str(load.base_of(folder)[1]))
  params = base.params()
  naming = peft_naming.of_config(base.config)
  everything = peft_whole.base_weights(params, base.model, naming)
  found = validate.findings(
    safetensors.read_json(folder / load.ADAPTER_CONFIG),
    list(peft_names.modules(params, base.model, naming).values()),
    [w.module for w in everything.values()],
  )
  for f in found:
    cli.say(f"{f.kind}: {f.field} {f.rule!r}: {f.text}")
  return dict(findings=[dataclasses.asdict(f) for f in found])


def _told(rows: Mapping[str, Any], **values: Any) -> dict[str, Any]:
  """Writes the report; returns what is told of all rows together."""
  if _REPORT.value is not None:
    text = json.dumps(cli.plain(dict(rows)), indent=1) + "\n"
    pathlib.Path(_REPORT.value).write_text(text)
  ranks = values.pop("ranks", None)
  if ranks:
    values |= dict(min_rank=min(ranks), max_rank=max(ranks))
  return dict(matrices=len(rows), **values)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Does it; returns the result, which the command prints as JSON."""
  del argv
  cli.required(**{"op": _OP.value, "from": _FROM.value or None})
  runtime.setup()
  from research.interop import convert
  from research.lora.merge import arithmetic
  from research.typing import UserError

  writes = {how: _combined for how in (arithmetic.CAT, *arithmetic.WAYS)}
  writes |= dict(lora=_lora, intruders=_intruders)
  reads = dict(diagnose=_diagnosed, fidelity=_fidelity, validate=_validated)
  reads |= dict(merge=_merged)
  if _OP.value not in writes | reads:
    raise UserError(
      f"--op={_OP.value}: expected one of {', '.join([*writes, *reads])}"
    )
  common = {"op": _OP.value, "from": _FROM.value}
  if _OP.value in reads:
    return common | reads[_OP.value]()
  cli.required(to=_TO.value)
  to = pathlib.Path(_TO.value)
  convert.free(to)
  source, params, told = writes[_OP.value]()
  made = dataclasses.replace(source, params=lambda: params)
  convert.to_peft(made, to)
  return common | told | dict(to=_TO.value)


if __name__ == "__main__":
  cli.run(main)
