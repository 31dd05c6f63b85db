"""Formats a forecast as text and as JSON."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from research import tables
from research.planning.forecast import Forecast

_SHOWN = 12
_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def as_json(cost: Forecast, model_flops: float, tokens: int) -> dict[str, Any]:
  """Returns a forecast as a JSON object; None for unknown values.

  Args:
    cost: the forecast per device.
    model_flops: FLOPs of the model in a step, over all devices.
    tokens: number of tokens in a step.
  """
  m, seconds = cost.memory, cost.at_least
  peak = cost.peak_flops
  return {
    "fits": m.fits,
    "argument_bytes": m.arguments,
    "output_bytes": m.outputs,
    "temporary_bytes": m.temporaries,
    "total_bytes": m.total,
    "limit_bytes": int(m.limit),
    "flops": cost.flops,
    "bytes_accessed": cost.bytes,
    "bytes_sent": sum(e.sent for e in cost.exchanges),
    "useful_flops": model_flops / (cost.flops * cost.devices),
    "unknown_loops": cost.unknown_loops,
    "seconds": seconds,
    "seconds_by_part": dict(cost.seconds),
    "seconds_without_overlap": cost.without_overlap,
    "tokens_per_s": tokens / seconds if seconds else None,
    "mfu_bound": (
      model_flops / (seconds * cost.devices * peak) if seconds else None
    ),
    "collectives": [
      {
        "kind": e.kind,
        "axes": list(e.axes),
        "shapes": list(e.shapes),
        "count": e.count,
        "payload_bytes": e.payload,
        "sent_bytes": e.sent,
        "seconds": e.seconds,
      }
      for e in cost.exchanges
    ],
  }


def describe(
  cost: Forecast, found: Mapping[str, Any], notes: Sequence[str] = ()
) -> str:
  """Returns a forecast as readable text.

  Args:
    cost: the forecast per device.
    found: its `as_json`.
    notes: of its topology, which are shown last.
  """
  m = cost.memory
  verdict = "fits" if m.fits else "DOES NOT FIT"
  lines = [
    f"memory of a device: {format_bytes(m.arguments)} arguments,"
    f" {format_bytes(m.temporaries)} temporaries,"
    f" {format_bytes(m.outputs)} new outputs",
    f"  in all {format_bytes(m.total)} of {format_bytes(m.limit)}: {verdict}",
    f"work of a device: {cost.flops:.3g} FLOPs in matrix products"
    f" ({found['useful_flops']:.0%} of them the model's),"
    f" {format_bytes(cost.bytes)} through memory,"
    f" {format_bytes(found['bytes_sent'])} sent",
  ]
  if cost.unknown_loops:
    lines.append(
      f"  {cost.unknown_loops} loops have lengths that depend on data and"
      " count once: expect more"
    )
  lines += _seconds(cost, found) + _exchanges(cost)
  lines += [f"note: {note}" for note in notes]
  return "\n".join(lines)


def _seconds(cost: Forecast, found: Mapping[str, Any]) -> list[str]:
  if not cost.seconds:
    return ["seconds: not known for this kind of device"]
  parts = ", ".join(f"{k} {v:.3g}" for k, v in cost.seconds.items())
  return [
    f"seconds of a step: {parts}; at least {cost.at_least:.3g} if all overlaps,"
    f" {cost.without_overlap:.3g} if nothing does",
    f"  at most {found['tokens_per_s']:,.0f} tokens a second, MFU at most"
    f" {found['mfu_bound']:.0%}",
  ]


def _exchanges(cost: Forecast) -> list[str]:
  if not cost.exchanges:
    return ["collectives: none"]
  rows = [("count", "collective", "over", "each", "sent", "ms", "of")]
  for e in cost.exchanges[:_SHOWN]:
    of = e.shapes[0] + (f" +{len(e.shapes) - 1}" if len(e.shapes) > 1 else "")
    rows.append(
      (
        f"{e.count:,.0f}",
        e.kind,
        " ".join(e.axes),
        format_bytes(e.payload),
        format_bytes(e.sent),
        "" if e.seconds is None else f"{1e3 * e.seconds:.3g}",
        of,
      )
    )
  left = len(cost.exchanges) - _SHOWN
  return [
    "collectives of a step:",
    *(f"  {line}" for line in tables.aligned(rows, right=(0, 3, 4, 5))),
    *([f"  and {left} smaller ones"] if left > 0 else []),
  ]


def format_bytes(nbytes: float | int) -> str:
  """Formats a number of bytes with a unit."""
  for unit, size in _UNITS:
    if nbytes >= size:
      return f"{nbytes / size:.3g} {unit}"
  return f"{nbytes:.0f} B"


def parse_out_of_memory(message: str) -> dict[str, Any]:
  """Parses the compiler's out-of-memory error.

  Args:
    message: message of the error.

  Returns:
    The entries of `as_json` that it determines.
  """
  found = re.search(
    r"required for .*?\(([\d.]+)([KMGT])\).*?\(([\d.]+)([KMGT])\)", message
  )
  if not found:
    return {"fits": False, "message": message.splitlines()[0][:300]}
  sizes = {unit[0]: size for unit, size in _UNITS}
  needed, unit, has, of = found.groups()
  return {
    "fits": False,
    "total_bytes": int(float(needed) * sizes[unit]),
    "limit_bytes": int(float(has) * sizes[of]),
  }


def describe_out_of_memory(found: Mapping[str, Any]) -> str:
  """Formats the result of `parse_out_of_memory` as readable text."""
  needed = found.get("message")
  if needed is None:
    total, limit = (found[k] for k in ("total_bytes", "limit_bytes"))
    needed = f"{format_bytes(total)} of {format_bytes(limit)}"
  return (
    f"memory of a device: {needed}: DOES NOT FIT\n"
    "  Shard weights over fsdp or tensor, lower the batch, accumulate, or set"
    " remat='layer'."
  )
