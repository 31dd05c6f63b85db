"""PTX is parsed as Mosaic GPU dumps it; compiled kernels pass."""

import itertools
import json
import re

import pytest

from kernels_pallas.inspect import __main__ as command
from kernels_pallas.inspect import gpu, ptx
from kernels_pallas.inspect.gpu import Job
from tests.support_gpu import needs_kernels

PTXAS = """\
ptxas warning : Registers are spilled to local memory in function 'k', 8 bytes
ptxas info    : Function properties for k
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
PTX = """\
.visible .entry k()
{
\tadd.s32 %r1, %r2, 1;
$L__BB0_1:
\tmbarrier.try_wait.parity.shared.b64 %p1, [%r1], %r2;
\t@%p1 bra $L__BB0_1;
$L__BB0_2:
\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;
\tex2.approx.ftz.f32 %f2, %f1;
\t@!%p2 bra $L__BB0_3;
\tfma.rn.f32 %f3, %f1, %f2, %f2;
$L__BB0_3:
\t@%p3 bra $L__BB0_2;
\tret;
}
"""


@pytest.fixture(name="dump")
def _dump(tmp_path):
  (tmp_path / "k_0.ptxas").write_text(PTXAS)
  (tmp_path / "k_0.ptx").write_text(PTX)
  (tmp_path / "k_0.resources.txt").write_text(
    "Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0)"
  )
  return tmp_path


def test_the_loop_of_matmuls_is_found_and_counted(dump):
  (found,) = ptx.read(dump)
  assert (found.name, found.registers, found.spills) == ("k", 168, 8)
  assert found.shared == 1024 and len(found.warnings) == 1
  assert found.flops == 2 * 64 * 128 * 16
  assert found.loop == {"wgmma": 1, "exp2": 1, "fma": 1, "other": 2}
  assert found.total["integer"] == found.total["barrier"] == 1


def test_a_warps_matmuls_count_as_a_warpgroups(dump):
  text = PTX.replace(
    "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}",
  )
  (dump / "k_0.ptx").write_text(text)
  (found,) = ptx.read(dump)
  assert found.loop["mma"] == 1 and found.flops == 2 * 64 * 8 * 16


def test_a_descriptor_says_how_large_a_matmul_is(dump):
  """M = 128 and N = 64 of CUTLASS's `UMMA::InstrDescriptor`, for bfloat16."""
  word = 8 << 24 | (64 // 8) << 17 | 1 << 10 | 1 << 7 | 1 << 4
  text = PTX.replace(
    "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2",
    "    tcgen05.mma.cta_group::1.kind::f16 [%r7], a_desc, b_desc, %r9, %p14",
  ).replace("$L__BB0_2:", f"\tmov.b32 \t%r9, {word};\n$L__BB0_2:")
  (dump / "k_0.ptx").write_text(text)
  (found,) = ptx.read(dump)
  assert found.loop["tcgen05"] == 1 and found.flops == 2 * 128 * 64 * 16


def test_other_formats_raise(dump):
  (dump / "k_0.ptxas").write_text("nothing")
  with pytest.raises(ValueError, match="another format"):
    ptx.read(dump)
  (dump / "k_0.ptxas").unlink()
  with pytest.raises(ValueError, match="found no"):
    ptx.read(dump)


def test_a_missing_compiler_is_reported(monkeypatch, capsys):
  monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
  assert command.main(["--target=h100"]) == 1
  assert "jax-cuda13-pjrt is not installed" in capsys.readouterr().err


# Bytes per block; tiles for Ampere have to fit an Ada, too.
SHARED = {"h100": 232_448, "a100": 101_376, "b200": 232_448}

MATRIX = list(
  itertools.product((64, 128, 256), gpu.DTYPES, ("full", "causal"),
                    ("forward", "backward"))
)  # fmt: skip


@pytest.mark.chips
@pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
@pytest.mark.parametrize(("head_dim", "dtype", "mask", "direction"), MATRIX)
def test_compiles_for_hopper(head_dim, dtype, mask, direction):
  job = Job(head_dim=head_dim, dtype=dtype, mask=mask, direction=direction)
  kernels = gpu.measure(job)
  assert (
    len(kernels) == {"forward": 1, "backward": 2 + (head_dim > 128)}[direction]
  )
  for kernel in kernels:
    assert kernel.total["wgmma"] >= 2 and kernel.total["copy"] >= 2
    assert kernel.loop["wgmma"] >= 2
    assert kernel.spills == 0
    assert kernel.shared is None or kernel.shared <= SHARED["h100"]


@pytest.mark.chips
@pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles_for_ampere(head_dim, mask, direction):
  job = Job(target="a100", head_dim=head_dim, mask=mask, direction=direction)
  kernels = gpu.measure(job)
  assert (
    len(kernels) == {"forward": 1, "backward": 2 + (head_dim > 64)}[direction]
  )
  for kernel in kernels:
    name = kernel.name.split("_")[2]
    matmuls = {"forward": 2, "dq": 3, "dkdv": 4, "dk": 3, "dv": 2}[name]
    # Streamed tiles of 32 or 64 tokens.
    assert kernel.flops / (matmuls * 2 * 64 * head_dim) in (32, 64)
    # Copies of 16 bytes a thread; the only shuffles are the softmax's sums.
    assert kernel.total["copy"] and not kernel.total.get("wgmma")
    shuffles = kernel.loop.get("shuffle", 0)
    assert kernel.loop["matrix"] and shuffles <= 8 * (name == "forward")
    assert kernel.spills == 0
    assert kernel.shared is not None and kernel.shared <= SHARED["a100"]


@pytest.mark.chips
@pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
@pytest.mark.parametrize(("head_dim", "dtype", "mask", "direction"), MATRIX)
def test_compiles_for_blackwell(head_dim, dtype, mask, direction):
  kernels = gpu.measure(
    Job(
      target="b200",
      head_dim=head_dim,
      dtype=dtype,
      mask=mask,
      direction=direction,
    )
  )
  assert (
    len(kernels) == {"forward": 1, "backward": 2 + (head_dim > 128)}[direction]
  )
  for kernel in kernels:
    name = kernel.name.split("_")[2]
    matmuls = {"forward": 2, "dq": 3, "dkdv": 4, "dk": 3, "dv": 2}[name]
    streamed = 128 if (name, head_dim) == ("forward", 64) else 64
    # 128 rows; the next tile's scores are started in this tile's step.
    assert kernel.flops == matmuls * 2 * 128 * streamed * head_dim
    assert kernel.loop["tcgen05"] and kernel.loop["tensor"]
    assert kernel.total["copy"] >= 2 and not kernel.loop.get("shuffle")
    assert kernel.spills == 0
    assert kernel.shared is not None and kernel.shared <= SHARED["b200"]


SOME = ("window", "softcap", "dropout")
# Bytes that a kernel spills, as in RESULTS.md; all others spill none.
SPILLS = {
  ("h100", ("dropout",), 64): {"dq": 8},
  ("b200", ("dropout",), 64): {"forward": 8},
}


@pytest.mark.chips
@pytest.mark.slow
@pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
  ("features", "head_dim", "value_dim"),
  [(gpu.FEATURES, H, None) for H in (64, 128, 256)]
  + [(SOME, H, None) for H in (128, 256)]
  + [((name,), 128, None) for name in gpu.FEATURES]
  + [(("dropout",), 64, None)]
  + [((), 80, None), ((), 192, None), ((), 192, 128)]
  + [((), 192, 256), ((), 256, 192)],
)
def test_features_compile_and_spill_what_the_readme_says(
  target, direction, features, head_dim, value_dim
):
  job = Job(
    target=target,
    direction=direction,
    mask="causal",
    head_dim=head_dim,
    value_dim=value_dim,
    features=features,
  )
  known = SPILLS.get((target, features, head_dim), {})
  for kernel in gpu.measure(job):
    name = kernel.name.split("_")[2]
    # Fewer would be wrong too: the page's table would be of another kernel.
    assert kernel.spills == known.get(name, 0), name
    assert kernel.shared is not None and kernel.shared <= SHARED[target]


@pytest.mark.chips
@pytest.mark.slow
@pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_eight_intervals_spill_nothing(target, direction, head_dim):
  job = Job(target=target, direction=direction, mask="eight", head_dim=head_dim)
  for kernel in gpu.measure(job):
    assert kernel.spills == 0, kernel.name


def test_unknown_features_are_reported(capsys):
  job = gpu._parser().parse_args(["--features=everything"])
  assert job.features == gpu.FEATURES
  job = gpu._parser().parse_args(["--features=sinks,window"])
  assert job.features == ("sinks", "window")
  with pytest.raises(SystemExit):
    command.main(["--target=h100", "--features=alibi"])
  assert "found alibi, expected of window" in capsys.readouterr().err


@needs_kernels
@pytest.mark.parametrize("features", [(name,) for name in gpu.FEATURES])
def test_every_feature_is_in_what_is_compiled(features):
  """Each changes the program, so that no feature is silently ignored."""
  import jax

  def program(features):
    job = Job(head_dim=64, mask="causal", length=256, features=features)
    run, data = gpu.call(job)
    x = jax.ShapeDtypeStruct((1, 256, 4, 64), "bfloat16")
    keys = x.update(shape=(1, 256, 2, 64))
    jaxpr = jax.make_jaxpr(lambda *a, d: run(*a, **d))(x, keys, keys, d=data)
    return re.sub("0x[0-9a-f]+", "", str(jaxpr))

  assert program(features) != program(())


@pytest.mark.chips
@pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
def test_the_interpreted_variant_compiles_too():
  assert gpu.measure(Job(operand="shared"))[0].spills == 0


@pytest.mark.chips
@pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
def test_the_last_line_is_the_result(capsys):
  assert gpu.main(["--compare=attention_mgpu"]) == 0
  text = capsys.readouterr().out
  found = json.loads(text.splitlines()[-1])
  assert found["spills"] == 0 and found["shared_bytes"] <= SHARED["h100"]
  assert "attention_mgpu" in text
