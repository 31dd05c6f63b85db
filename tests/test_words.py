"""Public names are the field's: a list of those that had to go."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]

BANNED = {
  "told": "conditioning, given",
  "seen": "inputs, gradients, history: what they are",
  "held": "transformed, stored, held_out",
  "rewrites": "state_transforms, batch_transforms",
  "beside": "fused, next_to: what it does",
  "laid": "layout",
  "begun": "started, prepared",
  "wanted": "expected, config",
  "looked": "measured",
  "clock": "time_embedding",
  "rung": "bucket",
  "nobody": "empty",
  "turned": "transposed",
  "halves": "what the two are",
  "apart": "separate, split",
  "asked": "requested, questions, scored",
  "sees": "vision, visible",
  "heard": "collected",
  "said": "shown, text",
  "eyes": "encoder",
}

KEPT = {
  "research/lora/methods/tokens.py": {"beside"},  # in checkpoints
  "kernels_pallas/inspect/chips.py": {"clock"},  # of a chip, in hertz
}
"""What files of before hold, and other meanings."""


def _public(path):
  """Yields the module's name, and those of its classes, functions, fields."""
  yield path.stem
  for node in ast.parse(path.read_text("utf-8")).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      yield node.name
    if isinstance(node, ast.ClassDef):
      for x in node.body:
        if isinstance(x, ast.FunctionDef):
          yield x.name
        elif isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name):
          yield x.target.id


def test_no_public_name_is_of_the_dialect():
  found = []
  for room in ("research", "kernels_pallas", "experiments"):
    for path in sorted((ROOT / room).rglob("*.py")):
      name = path.relative_to(ROOT).as_posix()
      # Studies become data: their names go with their code.
      if name.startswith(("experiments/studies", "experiments/notebooks")):
        continue
      banned = BANNED.keys() & {x.lower() for x in _public(path)}
      found += [
        f"{name}: {word}; say {BANNED[word]}"
        for word in banned - KEPT.get(name, set())
      ]
  assert not found, "\n".join(found)


VAGUE = {"found", "own", "given", "one"}
"""Names that say nothing of what they hold."""

MOST = {"bindings": 1035, "entries": 389}
"""Vague names that are bound, and entries that begin with "of": ever fewer."""


def _bound(tree):
  """Yields the names that a module's functions bind."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      yield node.id
    elif isinstance(node, ast.arg):
      yield node.arg


def test_names_inside_functions_say_what_they_hold():
  found = {"bindings": 0, "entries": 0}
  for room in ("research", "kernels_pallas", "experiments"):
    for path in (ROOT / room).rglob("*.py"):
      text = path.read_text("utf-8")
      names = _bound(ast.parse(text))
      found["bindings"] += sum(name in VAGUE for name in names)
      found["entries"] += len(re.findall(r"^ {4,}[\w, ]+: of ", text, re.M))
  assert all(found[kind] <= most for kind, most in MOST.items()), found
