"""Unmasking to look at: in a terminal, as a page, as a moving picture.

All of it is made from two rows, what each place became and the step that filled
it, which the sampler keeps anyway; so looking costs no step.
"""

import html
import json
import os
import textwrap
from collections.abc import Sequence

import numpy as np

from research.typing import UserError

HIDDEN = "░"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CONTROLS = {i: "�" for i in (*range(32), *range(127, 160)) if chr(i) != "\n"}


def shown(pieces: Sequence[str]) -> list[str]:
  """Returns tokens' texts without what would move a terminal's cursor."""
  tab = {9: "  "}
  return [p.translate(_CONTROLS | tab) or "·" for p in pieces]


def calls(filled: Sequence[int] | np.ndarray) -> list[int]:
  """Returns the steps that filled something, in order."""
  return sorted({int(n) for n in filled if n >= 0})


def frame(
  pieces: Sequence[str], filled: Sequence[int] | np.ndarray, now: int
) -> str:
  """Returns the text as it stood after a step, masks as blocks.

  Args:
    pieces: each place's text.
    filled: the step that filled it; -1 for what was given.
    now: the step.
  """
  return "".join(
    p if n <= now else HIDDEN for p, n in zip(pieces, filled, strict=True)
  )


def redrawn(
  text: str, note: str, above: int = 0, columns: int = 80
) -> tuple[str, int]:
  """Returns what to write on a terminal for a frame, and how many lines it has.

  Args:
    text: of the frame.
    note: a line below it.
    above: lines of the frame before it, which are drawn over.
    columns: of the terminal.
  """
  lines = _wrapped(text, columns - 1)
  back = f"\x1b[{above}A\r" if above else ""
  body = "".join(f"\x1b[2K{line}\n" for line in lines)
  # What is left of a longer frame goes, too.
  below = f"\x1b[2K{_DIM}{note}{_PLAIN}\n\x1b[0J"
  return back + body + below, len(lines) + 1


def _wrapped(text: str, columns: int) -> list[str]:
  out = []
  for line in text.split("\n"):
    out += textwrap.wrap(
      line, max(columns, 8), drop_whitespace=False, replace_whitespace=False
    ) or [""]
  return out


_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Unmasking</title>
<style>
body {{ font: 16px/1.6 monospace; max-width: 50em; margin: 2em auto; }}
pre {{ white-space: pre-wrap; }}
.given {{ color: #777; }}
.masked {{ color: #bbb; }}
.new {{ background: #cfc; }}
input {{ width: 100%; }}
</style>
<p><label>step <output id="now"></output> of {last}
<input id="at" type="range" min="-1" max="{most}" value="{most}"></label>
<pre id="text">{text}</pre>
<script>
const pieces = {pieces}, filled = {filled};
const at = document.getElementById("at");
function draw() {{
  const now = Number(at.value), text = document.getElementById("text");
  document.getElementById("now").textContent = now + 1;
  text.replaceChildren(...pieces.map((piece, i) => {{
    const span = document.createElement("span");
    span.textContent = filled[i] <= now ? piece : "{hidden}";
    span.className = filled[i] < 0 ? "given" : filled[i] > now ? "masked" :
      filled[i] == now ? "new" : "";
    return span;
  }}));
}}
at.addEventListener("input", draw);
draw();
</script>
"""


def page(pieces: Sequence[str], filled: Sequence[int] | np.ndarray) -> str:
  """Returns a page of HTML with a slider over the steps.

  It needs nothing else; what the model wrote stays text, whatever it says.
  """
  most = max(calls(filled), default=-1)
  # "</" would end the script.
  spelled = json.dumps(list(pieces)).replace("<", "\\u003c")
  return _PAGE.format(
    last=most + 1,
    most=most,
    text=html.escape("".join(pieces)),
    pieces=spelled,
    filled=json.dumps([int(n) for n in filled]),
    hidden=HIDDEN,
  )


def write_page(
  file: str | os.PathLike,
  pieces: Sequence[str],
  filled: Sequence[int] | np.ndarray,
) -> None:
  """Writes `page`.

  Raises:
    UserError: it cannot be written.
  """
  try:
    with open(file, "w", encoding="utf-8") as out:
      out.write(page(pieces, filled))
  except OSError as e:
    raise UserError(f"{file}: cannot be written ({e.strerror})") from e


def write_gif(
  file: str | os.PathLike,
  pieces: Sequence[str],
  filled: Sequence[int] | np.ndarray,
  columns: int = 64,
  seconds: float = 8.0,
) -> None:
  """Writes a moving picture, a frame for each step that filled something.

  Args:
    file: a .gif to write.
    pieces: each place's text.
    filled: the step that filled it; -1 for what was given.
    columns: characters in a line.
    seconds: that it takes, at most half of one a frame.

  Raises:
    UserError: it cannot be written.
  """
  from matplotlib.animation import PillowWriter
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  moments = [-1, *calls(filled)]
  texts = [
    "\n".join(_wrapped(frame(pieces, filled, now), columns)) for now in moments
  ]
  height = 1 + 0.2 * max(text.count("\n") + 1 for text in texts)
  drawn = Figure(figsize=(1 + 0.1 * columns, min(height, 40.0)), dpi=72)
  FigureCanvasAgg(drawn)
  place = dict(family="monospace", size=10, va="top", parse_math=False)
  words = drawn.text(0.03, 1 - 0.3 / height, "", **place)
  writer = PillowWriter(fps=max(2.0, len(moments) / seconds))
  try:
    with writer.saving(drawn, str(file), dpi=72):
      for text in texts:
        words.set_text(text)
        writer.grab_frame()
      for _ in range(int(writer.fps)):  # the end stays for a second
        writer.grab_frame()
  except OSError as e:
    raise UserError(f"{file}: cannot be written ({e.strerror})") from e
