"""What devices say to each other in a training step, read from its program."""

import pytest

from research import tree
from tests import support_hlo, support_mesh
from tests.support_mesh import BATCH, DEPTH, LENGTH, WIDTH

CASES = [
  ("plain", "data"),
  ("plain", "fsdp"),
  ("plain", "tensor"),
  ("plain", "mixed"),
  ("plain", "sequence"),
  ("plain", "ring"),
  ("plain", "ulysses"),
  ("lora", "mixed"),
  ("packed", "mixed"),
  pytest.param("qlora", "mixed", marks=pytest.mark.slow),
  ("qlora", "sequence"),
  pytest.param("experts", "expert", marks=pytest.mark.slow),
  ("experts", "experts"),
]


def collectives(kind, layout):
  step = support_mesh.compiled(kind, layout)
  return support_hlo.collectives(step.step.as_text(), step.mesh)


def large(found):
  """Returns those that move more than the few numbers of a metric or norm."""
  return [c for c in found if c.largest > WIDTH]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_no_stack_of_weights_travels(kind, layout):
  stacks = {
    x.shape[0]
    for path, x in tree.flatten_paths(support_mesh.start(kind).params)
    if path.startswith("run")
  }
  assert stacks == {DEPTH}
  for c in collectives(kind, layout):
    assert not any(s[:1] == (DEPTH,) for s in c.shapes), c.line


@pytest.mark.parametrize(("kind", "layout"), CASES)
@pytest.mark.sample(4, 3)
def test_nothing_is_larger_than_what_a_table_row_implies(kind, layout):
  """The residual stream, one weight of a layer, or the embedding: no more."""
  mesh = support_mesh.compiled(kind, layout).mesh.shape
  rows = mesh["data"] * mesh["fsdp"] * mesh["expert"]
  tokens = mesh["sequence"] * mesh["ring"] * mesh["ulysses"]
  stream = BATCH * LENGTH // rows // tokens * WIDTH
  # Experts' tokens are those of all devices along their axis.
  bound = max(stream * mesh["expert"], WIDTH * 64 // mesh["tensor"])
  if kind == "experts":
    bound = max(bound, 4 * WIDTH * 64 // mesh["expert"] // mesh["tensor"])
  for c in collectives(kind, layout):
    assert c.largest <= bound, (c.largest, bound, c.line)


@pytest.mark.parametrize(("kind", "layout"), CASES)
@pytest.mark.sample(4, 3)
def test_nothing_is_exchanged_that_could_stay(kind, layout):
  kinds = {c.kind for c in collectives(kind, layout)}
  more = {
    "sequence": {"collective-permute"},
    "ring": {"collective-permute"},
    "ulysses": {"all-to-all"},
  }
  known = {"all-reduce", "all-gather", "reduce-scatter"}
  assert kinds <= known | more.get(layout, set())


def test_data_only_adds_up_gradients():
  found = collectives("plain", "data")
  assert {c.kind for c in found} == {"all-reduce"}
  assert {c.axes for c in found} == {frozenset({"data"})}
  # A layer's at a time; the embedding's once, not once a chunk of the loss.
  in_loops = [s for c in found if c.loops for s in c.shapes if len(s) == 2]
  assert len(in_loops) == 7
  shapes = [s for c in found for s in c.shapes]
  assert shapes.count((64, WIDTH)) - in_loops.count((64, WIDTH)) <= 2


def test_fsdp_gathers_single_layers_in_the_loop_over_layers():
  found = collectives("plain", "fsdp")
  gathers = [c for c in found if c.kind == "all-gather"]
  assert {c.axes for c in found} == {frozenset({"fsdp"})}
  outside = [c for c in gathers if not c.loops]
  assert {c.shapes for c in outside} == {((64, WIDTH),)} and len(outside) <= 2
  # Seven weights a layer, once forward and once backward.
  assert sum(len(c.shapes) for c in gathers if c.loops == 1) == 14
  assert not [c for c in gathers if c.loops > 1]
  reduced = [c for c in large(found) if c.kind != "all-gather"]
  assert {c.kind for c in reduced} <= {"all-reduce", "reduce-scatter"}
  assert not [c for c in reduced if c.loops > 1]


@pytest.mark.slow
def test_tensor_only_adds_up_activations():
  found = collectives("plain", "tensor")
  assert {c.axes for c in found} == {frozenset({"tensor"})}
  assert {c.kind for c in found} == {"all-reduce"}
  stream = {(BATCH, LENGTH, WIDTH), (BATCH, 32 // BATCH, WIDTH)}
  assert {s for c in large(found) for s in c.shapes if len(s) > 2} <= stream


@pytest.mark.slow
def test_mora_gathers_what_it_folds_of_its_own_rows_along_tensor_alone():
  gathers, lora = (
    [c for c in collectives(kind, "mixed") if c.kind == "all-gather"]
    for kind in ("mora", "lora")
  )
  along = {c.axes for c in gathers if len(c.shapes[0]) == 3}
  assert along == {frozenset({"tensor"})}
  folded = [s for c in gathers for s in c.shapes if len(s) == 3]
  # One of four parts of the rows; groups of 20 or 22 fill the width up.
  assert {s[:2] for s in folded} == {(BATCH // 4, LENGTH)}
  assert max(s[2] for s in folded) <= WIDTH + 22
  # Inputs of two matrices that tensor cuts along them, gradients of five.
  assert len(folded) == 7
  weights = {s for c in lora for s in c.shapes if 4 not in s}
  assert {s for c in gathers for s in c.shapes if len(s) == 2} == weights


@pytest.mark.slow
def test_packed_weights_are_gathered_packed():
  found = collectives("packed", "mixed")
  gathers = [c for c in found if c.kind == "all-gather" and c.loops]
  assert {c.axes for c in gathers} == {frozenset({"fsdp"})}
  # 64 columns are two blocks of 16 bytes; decoded, four bytes a number.
  assert max(c.nbytes for c in gathers) <= 2 * 16 * 64


def test_along_the_sequence_only_keys_and_values_are_gathered():
  found = collectives("plain", "sequence")
  gathers = [c for c in large(found) if c.kind == "all-gather" and c.loops]
  # Rows of one of two devices, all positions, one of two key heads.
  assert {s for c in gathers for s in c.shapes} == {(4, LENGTH, 1, 16)}
  assert {c.axes for c in gathers} == {frozenset({"sequence"})}
  scattered = [c for c in found if c.kind == "reduce-scatter"]
  assert {s for c in scattered for s in c.shapes} == {(4, LENGTH // 2, 1, 16)}


def test_tokens_change_their_order_at_both_ends_of_the_layers_alone():
  found = collectives("plain", "sequence")
  moved = [c for c in found if c.kind == "collective-permute"]
  assert moved and not [c for c in moved if c.loops]
  # Half of a device's tokens: the stream, and integers for each token.
  halves = {(4, LENGTH // 4, WIDTH), (4, LENGTH // 4), (1, LENGTH // 4)}
  assert {s for c in moved for s in c.shapes} <= halves


@pytest.mark.slow
def test_a_ring_passes_keys_and_values_and_gathers_none():
  found = collectives("plain", "ring")
  inside = [c for c in found if c.kind == "collective-permute" and c.loops]
  # All rows, a quarter of the tokens, one of two key heads.
  shapes = {s for c in large(inside) for s in c.shapes}
  assert shapes == {(BATCH, LENGTH // 4, 1, 16)}
  assert not [c for c in found if c.kind == "all-gather" and c.loops > 1]
  gathered = {s for c in found if c.kind == "all-gather" for s in c.shapes}
  assert not [s for s in gathered if len(s) == 4]


@pytest.mark.slow
def test_heads_are_exchanged_for_tokens():
  found = collectives("plain", "ulysses")
  moved = [c for c in found if c.kind == "all-to-all"]
  assert {c.axes for c in moved} == {frozenset({"ulysses"})}
  # To each of two devices: half of the tokens, one head of each row.
  shapes = {s for c in large(moved) for s in c.shapes}
  assert shapes == {(4, LENGTH // 2, 1, 16)}


@pytest.mark.slow
def test_experts_exchange_tokens_not_weights():
  found = collectives("experts", "expert")
  over_experts = [c for c in found if c.axes == frozenset({"expert"})]
  kinds = {c.kind for c in large(over_experts)}
  assert kinds == {"all-gather", "reduce-scatter"}
  tokens = BATCH * LENGTH // 2  # of the two devices along `expert`
  for c in large(over_experts):
    assert all(s[0] in (tokens, tokens // 2) for s in c.shapes), c.line
