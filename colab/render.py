"""Runs a notebook and stores what its cells show, for people who only read.

  python -m colab.render 00_hello             # needs no Jupyter
  QUICK=1 python -m colab.render lora         # small: seconds, not minutes
  python -m colab.render lora --clear         # without outputs

What is stored: printed text, the last expression of a cell, and the figures
that it leaves open, as small PNG. Progress on stderr is not. The digest of the
code that ran goes into the metadata, so that a test sees when outputs are old.
"""

import argparse
import ast
import base64
import contextlib
import hashlib
import io
import json
import os
import pathlib
import pprint
import sys
import time
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parent
MAX_PICTURE = 60_000
"""Bytes of a PNG."""
SMALL = (
  "Stored with QUICK=1: steps and data are those of a test, and results are\n"
  "not always as the text has them.\n"
)


def read(path: pathlib.Path) -> dict[str, Any]:
  """Returns a notebook."""
  return json.loads(path.read_text("utf-8"))


def write(path: pathlib.Path, notebook: dict[str, Any]) -> None:
  """Writes a notebook as Jupyter does, with keys in order."""
  text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
  path.write_text(text + "\n", "utf-8")


def code_cells(notebook: dict[str, Any]) -> list[tuple[int, str]]:
  """Returns (number, source) of each cell of code."""
  return [
    (number, "".join(cell["source"]))
    for number, cell in enumerate(notebook["cells"])
    if cell["cell_type"] == "code"
  ]


def digest(notebook: dict[str, Any]) -> str:
  """Returns what changes with any cell of code."""
  sources = json.dumps([source for _, source in code_cells(notebook)])
  return hashlib.sha256(sources.encode()).hexdigest()[:16]


def run(
  cells: list[tuple[int, str]],
) -> tuple[dict[int, list[dict[str, Any]]], dict[str, Any]]:
  """Executes cells in one namespace, as a kernel does.

  Returns:
    The outputs of each cell, in Jupyter's format, and the namespace.
  """
  names: dict[str, Any] = {"__name__": "__main__"}
  outputs = {}
  for count, (number, source) in enumerate(cells, 1):
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
      try:
        value = _execute(source, f"cell {number}", names)
      except BaseException:
        print(f"cell {number} failed:\n{source}", file=sys.stderr)
        raise
    outputs[number] = _outputs(printed.getvalue(), value, count)
    seconds = time.monotonic() - start
    print(f"cell {number}: {seconds:.1f} s", file=sys.stderr, flush=True)
  return outputs, names


def _execute(source: str, name: str, names: dict[str, Any]) -> Any:
  """Runs a cell; returns the value of its last expression, if it ends so."""
  module = ast.parse(source, name)
  last = None
  if module.body and isinstance(module.body[-1], ast.Expr):
    last = ast.Expression(module.body.pop().value)
  exec(compile(module, name, "exec"), names)
  return None if last is None else eval(compile(last, name, "eval"), names)


def _outputs(printed: str, value: Any, count: int) -> list[dict[str, Any]]:
  out: list[dict[str, Any]] = []
  if printed:
    out.append(_stream(_lines(printed)))
  if value is not None:
    data = {
      "text/plain": _lines(
        pprint.pformat(value, width=79, compact=True, sort_dicts=False)
      )
    }
    # A figure has one that says None.
    if page := getattr(value, "_repr_html_", str)():
      data["text/html"] = _lines(page)
    result = {"output_type": "execute_result", "execution_count": count}
    out.append(result | {"data": data, "metadata": {}})
  if "matplotlib.pyplot" in sys.modules:
    out += [
      {"output_type": "display_data", "data": {"image/png": x}, "metadata": {}}
      for x in _pictures()
    ]
  return out


def _stream(text: list[str]) -> dict[str, Any]:
  return {"output_type": "stream", "name": "stdout", "text": text}


def _lines(text: str) -> list[str]:
  return text.splitlines(keepends=True)


def _pictures() -> list[str]:
  """Returns the open figures as PNG in base64, and closes them."""
  import matplotlib.pyplot as plt

  figures = [plt.figure(number) for number in plt.get_fignums()]
  out = [base64.b64encode(png(figure)).decode() for figure in figures]
  plt.close("all")
  return out


def png(figure: Any, limit: int = MAX_PICTURE) -> bytes:
  """Returns a figure as PNG of 128 colours, coarser where it is too large."""
  from PIL import Image

  for dpi in (80, 64, 50, 40, 32, 25):
    large, small = io.BytesIO(), io.BytesIO()
    figure.savefig(large, format="png", dpi=dpi, bbox_inches="tight")
    picture = Image.open(large).convert("RGB").quantize(128)
    picture.save(small, format="png", optimize=True)
    if small.tell() <= limit:
      return small.getvalue()
  raise ValueError(f"a figure takes {small.tell()} bytes, expected {limit}")


def clear(notebook: dict[str, Any]) -> None:
  """Removes all outputs."""
  for number, _ in code_cells(notebook):
    notebook["cells"][number] |= {"outputs": [], "execution_count": None}
  notebook["metadata"].pop("rendered", None)


def render(notebook: dict[str, Any]) -> None:
  """Runs a notebook, and puts the outputs into it."""
  cells = code_cells(notebook)
  outputs, _ = run(cells)
  clear(notebook)
  for count, (number, _) in enumerate(cells, 1):
    cell = notebook["cells"][number]
    cell |= {"outputs": outputs[number], "execution_count": count}
  quick = os.environ.get("QUICK") == "1"
  if quick:
    number, _ = cells[0]
    notebook["cells"][number]["outputs"].insert(0, _stream(_lines(SMALL)))
  notebook["metadata"]["rendered"] = {"code": digest(notebook), "quick": quick}


def main() -> None:
  """Renders, or clears, the notebook that the command line names."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
  parser.add_argument("name", choices=names)
  parser.add_argument("--clear", action="store_true", help="remove outputs")
  arguments = parser.parse_args()
  os.environ.setdefault("MPLBACKEND", "Agg")
  path = FOLDER / f"{arguments.name}.ipynb"
  notebook = read(path)
  os.chdir(FOLDER)  # as Jupyter does
  (clear if arguments.clear else render)(notebook)
  write(path, notebook)


if __name__ == "__main__":
  main()
