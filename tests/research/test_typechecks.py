"""Checks on the first call refuse what jaxtyping's hook refuses at import."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from research import typechecks

SOURCE = '''
"""A module of each kind of function that a check may sit on."""

import contextlib
import dataclasses
import functools
from typing import no_type_check

import jax
from jaxtyping import Array, Float


def plain(x: int, *, y: str = "a") -> int:
  return x if y else y


def same(x: Float[Array, "B D"], y: Float[Array, "B"]) -> Float[Array, "D"]:
  return x[0] if y[0] else y


def text(x: "Later") -> "Later":
  return x


class Later:
  @property
  def wrong(self) -> int:
    return "a"

  @staticmethod
  def static(x: int):
    return x

  @classmethod
  def of(cls, x: int) -> "Later":
    return cls()


@dataclasses.dataclass(frozen=True)
class Base:
  x: int
  y: str = "a"

  def twice(self, by: int = 2) -> int:
    return self.x * by


@dataclasses.dataclass(frozen=True)
class Derived(Base):
  z: float = 1.0


class Inherits(Base):
  pass


@dataclasses.dataclass(init=False)
class Written:
  x: int

  def __init__(self, x: int):
    self.x = x


def nested(x):
  def inner(y: int):
    return y

  return inner(x)


@no_type_check
def unchecked(x: int):
  return x


@contextlib.contextmanager
def context(x: int):
  yield x


@functools.cache
def cached(x: int):
  return x


@jax.custom_vjp
def custom(x: Float[Array, ""]):
  return x


custom.defvjp(lambda x: (x, None), lambda _, g: (g,))


def generator(x: int):
  yield x
'''
VECTOR, MATRIX = jnp.ones(2), jnp.ones([2, 3])
CALLS = [
  *[f"plain({x})" for x in ("1", "'a'", "1.0", "1, y='b'", "1, y=2", "")],
  *["plain(1, 2)"],
  *["plain(1, y='')", "plain(x=1)", "plain(z=1)"],
  *["same(MATRIX, VECTOR)", "same(MATRIX, MATRIX)", "same(MATRIX, 0 * VECTOR)"],
  *["same(MATRIX.T, VECTOR)", "text(Later())"],
  *["Later().wrong", "Later.static(1)", "Later.static('a')", "Later.of('a')"],
  *["Base(1)", "Base('a')", "Base(1, 2)", "Base()", "Base(1).twice('a')"],
  *["Derived(1, z=2)", "Derived(1, z='a')", "Derived('a')"],
  *["Inherits(1)", "Inherits('a')", "Written(1)", "Written('a')"],
  *["nested(1)", "nested('a')", "unchecked('a')", "cached(1)", "cached('a')"],
  *["context(1).__enter__()", "context('a').__enter__()"],
  *["custom(VECTOR[0])", "custom(VECTOR)"],
  *["list(generator(1))", "list(generator('a'))"],
]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """The same module behind our hook, and behind jaxtyping's."""
  folder = tmp_path_factory.mktemp("modules")
  for name in ("lazily_checked", "checked_at_import"):
    (folder / f"{name}.py").write_text(SOURCE)
  path, finders = list(sys.path), list(sys.meta_path)
  sys.path.insert(0, str(folder))
  try:
    typechecks.install(["lazily_checked"])
    jaxtyping.install_import_hook("checked_at_import", "beartype.beartype")
    yield [
      importlib.import_module(name)
      for name in ("lazily_checked", "checked_at_import")
    ]
  finally:
    sys.path[:], sys.meta_path[:] = path, finders


def _outcome(module, call):
  """Returns a value's text, or an error's, without the module's name."""
  names = {"MATRIX": MATRIX, "VECTOR": VECTOR}
  try:
    shown = repr(eval(call, vars(module) | names))  # noqa: S307
  except Exception as error:
    shown = f"{type(error).__name__}: {error}"
  lines = shown.replace(module.__name__, "module").splitlines()
  return [line.split(" at 0x")[0] for line in lines]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_refused_as_by_jaxtyping_s_hook(both, call):
  ours, theirs = (_outcome(module, call) for module in both)
  assert ours == theirs
  assert ours == _outcome(both[0], call)  # the second call, too


def test_a_name_that_is_defined_later_is_checked(both):
  """jaxtyping's hook cannot: at import, there is no such name yet."""
  ours, theirs = (_outcome(module, "text(1)") for module in both)
  assert "Type-check error" in ours[0]
  assert theirs == ["1"]


def test_some_calls_are_refused(both):
  refused = [c for c in CALLS if "Type-check error" in _outcome(both[0], c)[0]]
  assert len(refused) > 10


def test_an_import_builds_no_checker():
  """Nor does it import what would build one."""
  program = (
    "import sys\n"
    "from experiments.core import runtime\n"
    "runtime.prepare(['train', '--nohuge_pages'])\n"
    "from research.lora.methods import lora\n"
    "assert 'beartype' not in sys.modules, 'built at import'\n"
    "try:\n"
    "  lora.LoRA(rank='a')\n"
    "except Exception as error:\n"
    "  assert 'rank' in str(error), error\n"
    "else:\n"
    "  raise AssertionError('not checked')\n"
  )
  subprocess.run([sys.executable, "-c", program], check=True)


def test_checks_wait_until_jax_is_imported_whole(monkeypatch):
  """Another thread is at it, and this one would import parts of it as well."""

  def double(x: int) -> int:
    return 2 * x

  checked = typechecks.checked(double)
  monkeypatch.setattr(jax.__spec__, "_initializing", True, raising=False)
  assert checked("a") == "aa"
  monkeypatch.setattr(jax.__spec__, "_initializing", False, raising=False)
  with pytest.raises(jaxtyping.TypeCheckError):
    checked("a")
