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
_COLORS = {"old": "black", "new": "#00802b", "masked": "#999999"}
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


def layers(
  pieces: Sequence[str],
  filled: Sequence[int] | np.ndarray,
  now: int,
  columns: int = 80,
) -> dict[str, list[str]]:
  """Returns a frame in layers: what was there, what is new, what is masked.

  Each has the frame's lines, and spaces where another layer has a character:
  drawn over one another in a font of one width they are the frame, and each may
  have its colour.

  Args:
    pieces, filled, now: as of `frame`.
    columns: characters in a line.

  Returns:
    The lines of `old`, `new` and `masked`.
  """
  kinds = []
  for piece, n in zip(pieces, filled, strict=True):
    if n > now:
      kinds += ["masked"] * len(HIDDEN)
    else:
      kinds += ["new" if n == now >= 0 else "old"] * len(piece)
  at = 0
  out: dict[str, list[str]] = {"old": [], "new": [], "masked": []}
  for paragraph in frame(pieces, filled, now).split("\n"):
    for line in _wrapped(paragraph, columns):
      marked = list(zip(line, kinds[at : at + len(line)], strict=True))
      for kind, lines in out.items():
        lines.append("".join(c if k == kind else " " for c, k in marked))
      at += len(line)
    at += 1  # the line break
  return out


def _wrapped(text: str, columns: int) -> list[str]:
  out = []
  for line in text.split("\n"):
    out += textwrap.wrap(
      line,
      max(columns, 8),
      drop_whitespace=False,
      replace_whitespace=False,
      expand_tabs=False,
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
<p><button id="play" type="button">Play</button>
<label>step <output id="now"></output> of {last}
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
const moments = {moments}, play = document.getElementById("play");
let timer = null;
function stop() {{
  clearInterval(timer);
  timer = null;
  play.textContent = "Play";
}}
function advance() {{
  const next = moments.find(n => n > Number(at.value));
  if (next === undefined) {{ stop(); return; }}
  at.value = next;
  draw();
}}
play.addEventListener("click", () => {{
  if (timer !== null) {{ stop(); return; }}
  if (Number(at.value) >= {most}) {{ at.value = -1; draw(); }}
  play.textContent = "Pause";
  timer = setInterval(advance, {pause});
}});
at.addEventListener("input", () => {{ stop(); draw(); }});
draw();
</script>
"""


def page(
  pieces: Sequence[str],
  filled: Sequence[int] | np.ndarray,
  seconds: float = 8.0,
) -> str:
  """Returns a page of HTML with a slider over the steps, and a play button.

  It needs nothing else; what the model wrote stays text, whatever it says.

  Args:
    pieces: each place's text.
    filled: the step that filled it; -1 for what was given.
    seconds: that playing it takes, at most half of one a step.
  """
  moments = calls(filled)
  most = max(moments, default=-1)
  # "</" would end the script.
  spelled = json.dumps(list(pieces)).replace("<", "\\u003c")
  return _PAGE.format(
    last=most + 1,
    most=most,
    text=html.escape("".join(pieces)),
    pieces=spelled,
    filled=json.dumps([int(n) for n in filled]),
    hidden=HIDDEN,
    moments=moments,
    pause=round(1000 * min(0.5, seconds / max(len(moments), 1))),
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

  What a step filled is green in its frame, and masks are grey.

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
  # After the last step nothing is new.
  moments += [moments[-1] + 1]
  frames = [layers(pieces, filled, now, columns) for now in moments]
  count = max(len(text["old"]) for text in frames)
  height = min(1 + 0.2 * count, 40.0)
  drawn = Figure(figsize=(1 + 0.1 * columns, height), dpi=72)
  FigureCanvasAgg(drawn)
  font = dict(family="monospace", size=10, parse_math=False)
  words = {
    (kind, i): drawn.text(
      0.03, 1 - (0.5 + 0.2 * i) / height, "", color=color, **font
    )
    for kind, color in _COLORS.items()
    for i in range(count)
  }
  writer = PillowWriter(fps=max(2.0, len(moments) / seconds))
  try:
    with writer.saving(drawn, str(file), dpi=72):
      for text in frames:
        for (kind, i), artist in words.items():
          artist.set_text(text[kind][i] if i < len(text[kind]) else "")
        writer.grab_frame()
      for _ in range(int(writer.fps)):  # the end stays for a second
        writer.grab_frame()
  except OSError as e:
    raise UserError(f"{file}: cannot be written ({e.strerror})") from e
