"""Costs of compiled programs against manual counts, and of TPU programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from research.nn import flops
from research.planning import chips, cost, hlo
from research.planning.forecast import forecast
from research.sharding import Layout
from research.typing import UserError

L, B, D = 5, 16, 64


def _cost(f, *shapes, devices=1):
  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  compiled = jax.jit(f).lower(*args).compile()
  return cost.program_cost(hlo.parse(compiled.as_text()), devices)


def _scan(w, x):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def _nested(w, x):
  return jax.lax.fori_loop(0, 3, lambda _, x: _scan(w, x), x)


@pytest.mark.parametrize("f, times", [(_scan, 1), (_nested, 3)])
def test_the_body_of_a_loop_counts_as_often_as_it_runs(f, times):
  found = _cost(f, (L, D, D), (B, D))
  assert found.flops == times * L * 2 * B * D * D
  assert found.unknown == 0
  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((L, D, D), (B, D))]
  assert flops.count_flops(f, *args) == found.flops


def test_a_layer_of_a_stack_is_read_once_and_the_stack_not_for_each():
  found = _cost(_scan, (L, D, D), (B, D))
  stack, row = 4 * L * D * D, 4 * B * D
  # Each layer is read, and may be copied out first; activations come and go.
  assert stack <= found.bytes <= 3 * stack + 6 * L * row + 1000


def test_a_loop_that_data_end_counts_once_and_is_said():
  def f(w, x):
    return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ w, x)

  found = _cost(f, (D, D), (B, D))
  assert found.flops == 2 * B * D * D
  assert found.unknown == 1


def test_the_gradient_of_a_scan_costs_two_more_forward_passes():
  def f(w, x):
    return jax.grad(lambda w: (_scan(w, x) ** 2).sum())(w)

  # The gradient with respect to the first layer's input is not needed, but
  # the loop computes it like any other.
  assert _cost(f, (L, D, D), (B, D)).flops == 3 * L * 2 * B * D * D


def test_collectives_in_a_loop_have_counts_payloads_and_axes():
  mesh = Layout(data=2, fsdp=2, tensor=2).mesh()

  def f(x, y, z):
    def body(carry, _):
      a, b, c = carry
      b = jax.lax.all_gather(b, "fsdp", tiled=True)[: len(b)] + b
      return (a + jax.lax.psum(a * a, ("data", "tensor")), b, c), None

    (a, b, c), _ = jax.lax.scan(body, (x, y, z), None, L)
    return a, b, jax.lax.ppermute(c, "tensor", [(0, 1), (1, 0)])

  spec = P(("data", "fsdp", "tensor"))
  mapped = jax.shard_map(
    f, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3, check_vma=False
  )
  args = [jax.ShapeDtypeStruct((8 * B, D), jnp.float32)] * 3
  compiled = jax.jit(mapped).lower(*args).compile()
  found = cost.program_cost(hlo.parse(compiled.as_text()), mesh.size)
  seen = {
    (c.kind, c.group, c.size, c.payload, c.sent): n
    for c, n in found.collectives.items()
  }
  part = 4 * B * D
  assert seen == {
    # Devices are numbered data first, tensor last.
    ("all-reduce", (0, 1, 4, 5), 4, part, 2 * part * 3 / 4): L,
    ("all-gather", (0, 2), 2, 2 * part, part): L,
    ("collective-permute", (0, 1), 8, part, part): 1,
  }
  chip = chips.Chip(
    name="chip", memory=1e9, flops=1e12, bandwidth=1e11, link=1e10
  )
  topology = chips.Topology(name="chips", devices=jax.devices(), chip=chip)
  expected = forecast(compiled, mesh, topology)
  sent = L * (2 * part * 3 / 4 + part) + part
  assert expected.seconds["links"] == pytest.approx(sent / chip.link)
  assert expected.without_overlap == sum(expected.seconds.values())
  exchanges = expected.exchanges
  assert {(e.kind, e.axes, e.count) for e in exchanges} == {
    ("all-reduce", ("data", "tensor"), L),
    ("all-gather", ("fsdp",), L),
    ("collective-permute", ("tensor",), 1),
  }


# As XLA writes them for TPUs; the shapes say what each one multiplies.
HEAD = "\nENTRY %main (p: f32[]) -> f32[] {\n"


@pytest.mark.parametrize(
  "left, right, out, attributes, products",
  [
    # A batch of rows times a matrix.
    (
      "bf16[2,256,512]",
      "bf16[512,2048,1]",
      "bf16[2,256,2048]",
      "window={size=1}, dim_labels=0bf_io0->0bf",
      2 * 256 * 512 * 2048,
    ),
    # Two parts of a contracted axis at once.
    (
      "bf16[2,256,2,32]",
      "bf16[2,32,2048,1]",
      "bf16[2,256,2048,1]",
      "window={size=2x1}, dim_labels=1b0f_0io1->1bf0",
      2 * 256 * 2 * 32 * 2048,
    ),
    # Two matrices, told apart by padding, whose products are none.
    (
      "bf16[2,256,512,1]",
      "bf16[2,128,512,1]",
      "bf16[2,256,2,128]",
      "window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1},"
      " dim_labels=0bf1_1oi0->0b1f",
      2 * 256 * 512 * 2 * 128,
    ),
    # Attention's batched product: batch as a dilated spatial dimension.
    (
      "bf16[4,8,16]",
      "bf16[4,16,32]",
      "bf16[4,8,32]",
      "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
      4 * 8 * 16 * 32,
    ),
    # A filter of three taps for each of 8 channels, two rows of 16, padded on
    # the left: the first tap misses two positions, the second one.
    (
      "f32[2,16,8]",
      "f32[3,1,8]",
      "f32[2,16,8]",
      "window={size=3 pad=2_0}, dim_labels=b0f_0io->b0f, feature_group_count=8",
      2 * 8 * (14 + 15 + 16),
    ),
    # Its gradient: as many products, of rows that JAX groups.
    (
      "f32[2,16,8]",
      "f32[2,16,8]",
      "f32[3,1,8]",
      "window={size=16 pad=2_0}, dim_labels=f0b_i0o->0bf, batch_group_count=8",
      2 * 8 * (14 + 15 + 16),
    ),
  ],
)
def test_matrix_products_that_tpus_call_convolutions(
  left, right, out, attributes, products
):
  text = (
    f"HloModule m\n{HEAD}  %a = {left}{{0}} parameter(0)\n"
    f"  %b = {right}{{0}} parameter(1)\n  ROOT %c = {out}{{0}}"
    f" convolution(%a, %b), {attributes}\n}}\n"
  )
  assert cost.program_cost(hlo.parse(text), 1).flops == 2 * products


LOOP = """HloModule m

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %step)
  %dot = f32[8,8]{1,0:T(8,128)S(1)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="f(x)[a, b]"}
  ROOT %out = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) tuple(%next, %dot)
}

%condition (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %end = s32[]{:T(128)} constant(END)
  ROOT %less = pred[]{:T(512)} compare(%i, %end), direction=DIRECTION
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0:T(8,128)} parameter(0)
  %copy-start = (f32[8,8]{1,0:T(8,128)S(1)}, f32[8,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %fast = f32[8,8]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %zero = s32[]{:T(128)} constant(START)
  %first = s32[]{:T(128)} copy(%zero)
  %carry = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) tuple(%first, %fast)
  %while = (s32[]{:T(128)}, /*index=1*/f32[8,8]{1,0:T(8,128)S(1)}) while(%carry), condition=%condition, body=%body
  ROOT %y = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%while), index=1
}
"""  # noqa: E501


@pytest.mark.parametrize(
  "start, end, step, direction, runs",
  [(0, 30, 1, "LT", 30), (1, 16, 2, "LT", 8), (0, 7, 1, "LE", 8)],
)
def test_a_loop_without_a_note_says_how_often_it_runs(
  start, end, step, direction, runs
):
  text = LOOP.replace("START", str(start)).replace("END", str(end))
  text = text.replace("STEP", str(step)).replace("DIRECTION", direction)
  found = cost.program_cost(hlo.parse(text), 1)
  assert found.flops == runs * 2 * 8 * 8 * 8
  assert found.unknown == 0
  # The loop works in the chip's own memory: one read of x, and counters.
  assert 256 <= found.bytes < 256 + 24 * (runs + 1)


def _group(attributes, opcode="all-gather"):
  text = (
    f"HloModule m\n{HEAD}  %a = f32[4]{{0}} parameter(0)\n"
    f"  ROOT %c = f32[64]{{0}} {opcode}(%a), {attributes}\n}}\n"
  )
  (found,) = cost.program_cost(hlo.parse(text), 16).collectives
  return found.group


@pytest.mark.parametrize(
  "attributes, group",
  [
    ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
    ("replica_groups={}, dimensions={0}", tuple(range(16))),
    ("replica_groups=[8,2]<=[16], dimensions={0}", (0, 1)),
    ("replica_groups=[4,4]<=[8,2]T(1,0), dimensions={0}", (0, 2, 4, 6)),
    ("replica_groups=mesh['a'=16] {'a'}, dimensions={0}", tuple(range(16))),
    ("replica_groups=mesh['a'=2,'b'=8] {'a'}, dimensions={0}", (0, 8)),
    ("replica_groups=mesh['a'=16] {'a':(2)4}, dimensions={0}", (0, 2, 4, 6)),
  ],
)
def test_every_way_to_write_a_group_of_devices(attributes, group):
  assert _group(attributes) == group


def test_the_pair_of_a_permutation_is_one_that_talks():
  pairs = "source_target_pairs={{0,0},{1,3},{3,1},{2,2}}"
  assert _group(pairs, "collective-permute") == (1, 3)


def test_a_collective_that_several_fusions_share_counts_once():
  chain = 'frontend_attributes={chain_id="0"}'
  gather = f"all-gather(%p), replica_groups=[2,2]<=[4], {chain}"
  text = f"""HloModule m

%begin (p: f32[4]) -> f32[8] {{
  %p = f32[4]{{0}} parameter(0)
  %g = f32[8]{{0}} {gather}
  ROOT %s = f32[8]{{0}} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%end (p: f32[4]) -> f32[8] {{
  %p = f32[4]{{0}} parameter(0)
  %g = f32[8]{{0}} {gather}
  ROOT %s = f32[8]{{0}} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}
{HEAD}  %p = f32[4]{{0}} parameter(0)
  %a = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%begin
  ROOT %b = f32[8]{{0}} fusion(%a), kind=kCustom, calls=%end
}}
"""  # noqa: E501
  assert list(cost.program_cost(hlo.parse(text), 4).collectives.values()) == [1]


@pytest.mark.parametrize(
  "branches",
  [
    "branch_computations={%multiply, %add}",
    "true_computation=%add, false_computation=%multiply",
  ],
)
def test_of_branches_the_most_of_each_cost_counts(branches):
  """One multiplies, the other one reads and writes more."""
  text = f"""HloModule m

%multiply (p: f32[8,8]) -> f32[8,8] {{
  %p = f32[8,8]{{1,0}} parameter(0)
  ROOT %d = f32[8,8]{{1,0}} dot(%p, %p), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%add (q: f32[8,8]) -> f32[8,8] {{
  %q = f32[8,8]{{1,0}} parameter(0)
  %r = f32[8,8]{{1,0}} add(%q, %q)
  ROOT %s = f32[8,8]{{1,0}} add(%r, %q)
}}
{HEAD}  %i = s32[] parameter(0)
  %x = f32[8,8]{{1,0}} parameter(1)
  ROOT %c = f32[8,8]{{1,0}} conditional(%i, %x, %x), {branches}
}}
"""  # noqa: E501
  found = cost.program_cost(hlo.parse(text), 1)
  assert (found.flops, found.bytes) == (2 * 8**3, 2 * 3 * 4 * 8 * 8)


def test_an_asynchronous_computation_counts_once():
  """XLA's cost analysis as well gives all of it to the start."""
  text = f"""HloModule m

%sum (p: f32[64], q: f32[64]) -> f32[64] {{
  %p = f32[64]{{0}} parameter(0)
  %q = f32[64]{{0}} parameter(1)
  ROOT %s = f32[64]{{0}} add(%p, %q)
}}
{HEAD}  %a = f32[64]{{0}} parameter(0)
  %b = f32[64]{{0}} parameter(1)
  %start = ((f32[64]{{0}}, f32[64]{{0}}), f32[64]{{0}}, u32[]) async-start(%a, %b), calls=%sum
  %later = ((f32[64]{{0}}, f32[64]{{0}}), f32[64]{{0}}, u32[]) async-update(%start)
  ROOT %done = f32[64]{{0}} async-done(%later)
}}
"""  # noqa: E501
  assert cost.program_cost(hlo.parse(text), 1).bytes == 3 * 4 * 64


@pytest.mark.parametrize(
  "stated",
  [
    '"cost_estimate":{"flops":"640","bytes_accessed":"9"}',
    r'cost_estimate_json = "{\22flops\22: 640, \22bytes_accessed\22: 9}"',
  ],
  ids=["tpu", "gpu"],
)
def test_a_kernel_costs_what_it_states(stated):
  text = f"""HloModule m
{HEAD}  %a = f32[4]{{0}} parameter(0)
  ROOT %k = f32[4]{{0}} custom-call(%a), custom_call_target="kernel", backend_config={{{stated}}}
}}
"""  # noqa: E501
  assert cost.program_cost(hlo.parse(text), 1).flops == 640


@pytest.mark.parametrize(
  ("out", "left", "right", "dims"),
  [
    ("24,32", "24,16", "8,16,32", "{1}, rhs_contracting_dims={1}"),
    ("24,16", "24,32", "8,16,32", "{1}, rhs_contracting_dims={2}"),
    ("8,16,32", "24,16", "24,32", "{0}, rhs_contracting_dims={0}"),
  ],
  ids=["forward", "of_rows", "of_matrices"],
)
def test_a_grouped_product_multiplies_each_row_once(out, left, right, dims):
  text = (
    "HloModule m\n\nENTRY %main () -> f32[] {\n"
    f"  %x = f32[{left}]{{}} parameter(0)\n"
    f"  %w = f32[{right}]{{}} parameter(1)\n"
    "  %sizes = s32[8]{0} parameter(2)\n"
    f"  ROOT %y = f32[{out}]{{}} ragged-dot(%x, %w, %sizes),"
    f" lhs_contracting_dims={dims}, lhs_ragged_dims={{0}}\n}}\n"
  )
  found = cost.program_cost(hlo.parse(text), 1)
  assert found.flops == 2 * 24 * 16 * 32


def test_text_of_something_else_is_refused():
  with pytest.raises(UserError, match="ENTRY"):
    hlo.parse("module @jit_f { }")
