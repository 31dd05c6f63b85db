"""Traces to look at: steps coloured by their scores, in a terminal or a page.

What a model wrote is a stranger's text. Terminal escapes, control characters
and marks that reorder text are taken out; a page escapes the rest, and forbids
scripts.
"""

import html
import re
from collections.abc import Sequence

from experiments.searching.pool import Sample, Searched

PROBLEMS, SAMPLES = 50, 16
"""Most of a pool that a page shows."""

_ESCAPES = re.compile(
  r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor
  r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])"  # OSC, DCS, SOS, PM, APC ...
  r"[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"  # ... up to their end
  r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)

_RAMP = (202, 208, 214, 222, 250, 153, 111, 75, 33)
"""Colours of a terminal with 256, from orange (0) to blue (1)."""

_PLAIN, _BOLD, _DIM = "\x1b[0m", "\x1b[1m", "\x1b[2m"


def clean(text: str) -> str:
  """Returns a text without what a terminal would obey instead of show."""
  return _CONTROLS.sub("", _ESCAPES.sub("", text))


def for_terminal(searched: Searched, color: bool) -> str:
  """Returns a problem and its samples as lines of a terminal.

  Args:
    color: whether steps are coloured; their scores are printed in any case.
  """

  def style(code: str, text: str) -> str:
    return f"{code}{text}{_PLAIN}" if color else text

  lines = [style(_BOLD, clean(searched.problem.prompt))]
  for i, sample in enumerate(searched.samples):
    lines.append(style(_DIM, f"  sample {i}: {summary(sample)}"))
    for step in sample.trace.steps:
      text = clean(step.text).strip()
      score = "    " if step.score is None else f"{step.score:.2f}"
      code = "" if step.score is None else _code(step.score)
      body = text.replace("\n", "\n         ")
      lines.append(f"    {score} {style(code, body)}")
  return "\n".join(lines)


def summary(sample: Sample) -> str:
  """Returns how a sample ended, and what is made of it, in a few words."""
  verdict = sample.verdict
  if not sample.trace.complete:
    return f"cut ({sample.trace.finish}), no vote"
  said = clean(verdict.reason) or ("correct" if verdict.correct else "wrong")
  if sample.answer is None:
    return said
  return f"{clean(sample.answer)!s:.80}: {said}"


def page(pool: Sequence[Searched], title: str) -> str:
  """Returns a page of HTML that needs nothing else."""
  body = "\n".join(map(_section, pool[:PROBLEMS]))
  rest = len(pool) - PROBLEMS
  more = f"<p>{rest} more problems are in pool.jsonl.</p>" if rest > 0 else ""
  return _PAGE.format(title=html.escape(clean(title)), body=body + more)


def _section(searched: Searched) -> str:
  right = sum(x.correct for x in searched.samples)
  ledger = searched.ledger
  parts = [
    "<section>",
    f"<h2>{_shown(searched.problem.prompt)}</h2>",
    f"<p>{right} of {len(searched.samples)} samples are right; policy"
    f" {ledger.flops_policy:.3g} and verifier {ledger.flops_verifier:.3g}"
    " FLOPs.</p>",
    *map(_article, searched.samples[:SAMPLES]),
    "</section>",
  ]
  return "\n".join(parts)


def _article(sample: Sample) -> str:
  kind = "right" if sample.correct else "wrong"
  steps = "".join(
    f"<span{_background(step.score)}>{_shown(step.text)}</span>"
    for step in sample.trace.steps
  )
  about = html.escape(summary(sample))
  return f'<article class="{kind}"><p>{about}</p><pre>{steps}</pre></article>'


def _background(score: float | int | None) -> str:
  if score is None:
    return ""
  share = min(max(float(score), 0.0), 1.0)
  hue = 30 if share < 0.5 else 210
  strength = 95 - 40 * abs(share - 0.5)
  return (
    f' style="background:hsl({hue} 90% {strength:.0f}%)" title="{score:.3f}"'
  )


def _shown(text: str) -> str:
  return html.escape(clean(text))


def _code(score: float | int) -> str:
  share = min(max(float(score), 0.0), 1.0)
  return f"\x1b[38;5;{_RAMP[round(share * (len(_RAMP) - 1))]}m"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em;
  margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
h2 {{ font-size: 1em; white-space: pre-wrap }}
article {{ border-left: 4px solid #d55e00; margin: 1em 0; padding: 0 1em }}
article.right {{ border-color: #0072b2 }}
article p {{ margin: 0; color: #555 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0 }}
</style>
<h1>{title}</h1>
<p>A step's colour is its score: orange is low, blue is high. A bar is blue
where the answer is right.</p>
{body}
</html>
"""
