"""Checks shapes and types of calls, once JAX is imported.

jaxtyping's own hook builds two checkers for each function while its module is
imported: two thirds of a command's start, most of it for functions that the
command never calls. Here importing a module costs what it does without checks,
and a checker is built when its function is first called. Before JAX is imported
there are no arrays, and help and most errors do not wait for it.
"""

import ast
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from typing import Any

_DECORATOR = "__checked__"
"""What a module calls `checked`; no name of its own is like that."""


def install(packages: Sequence[str]) -> None:
  """Checks modules of these packages that are imported from now on."""
  sys.meta_path.insert(0, _Finder(packages))


def checked(target: Any) -> Any:
  """Returns a function, or a class, whose calls are checked.

  Of a class only a dataclass's `__init__` is: its methods are functions, which
  have been decorated before.
  """
  if not isinstance(target, type):
    return _on_first_call(target)
  init = target.__init__
  inherited = getattr(init, "__globals__", None) is globals()
  if dataclasses.is_dataclass(target) and not inherited:
    target.__init__ = _on_first_call(init)
  return target


def _on_first_call(function: Callable) -> Callable:
  """Returns a function that builds its checker when that is first used."""
  checker = None

  @functools.wraps(function)
  def call(*args, **kwargs):
    nonlocal checker
    __tracebackhide__ = True
    if checker is None:
      # Another thread may be importing JAX, parts of which a checker imports.
      spec = getattr(sys.modules.get("jax"), "__spec__", None)
      if spec is None or getattr(spec, "_initializing", False):
        return function(*args, **kwargs)
      checker = _checker(function)
    return checker(*args, **kwargs)

  return call


def _checker(function: Callable) -> Callable:
  import beartype
  import jaxtyping

  return jaxtyping.jaxtyped(function, typechecker=beartype.beartype)


class _Decorate(ast.NodeTransformer):
  """Decorates each function, and each class, that `no_type_check` is not on.

  Of a function's decorators it is the innermost, since others, such as
  `jax.custom_vjp`, return no functions; of a class's the outermost, since
  `dataclass` writes the `__init__`.
  """

  def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
    return self._decorated(node, len(node.decorator_list))

  def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
    return self._decorated(node, 0)

  def _decorated(self, node, place):
    names = [ast.unparse(x).split(".")[-1] for x in node.decorator_list]
    if "no_type_check" in names:
      return node
    decorator = ast.Name(_DECORATOR, ast.Load())
    node.decorator_list.insert(place, ast.copy_location(decorator, node))
    return self.generic_visit(node)


class _Loader(importlib.machinery.SourceFileLoader):
  """Compiles a module with decorators; its bytecode has a name of its own."""

  def source_to_code(self, data, path, *, _optimize=-1):
    return super().source_to_code(
      _Decorate().visit(ast.parse(data, path)), path, _optimize=_optimize
    )

  def exec_module(self, module):
    setattr(module, _DECORATOR, checked)
    super().exec_module(module)

  def get_data(self, path):
    return super().get_data(_renamed(path))

  def set_data(self, path, data, *, _mode=0o666):
    super().set_data(_renamed(path), data, _mode=_mode)


def _renamed(path: str) -> str:
  """Returns where a file is read and written: bytecode apart from others'."""
  return path.removesuffix(".pyc") + ".checked.pyc" * path.endswith(".pyc")


class _Finder(importlib.abc.MetaPathFinder):
  """Finds modules of packages as Python does; `_Loader` loads them."""

  def __init__(self, packages: Sequence[str]):
    self._packages = tuple(f"{package}." for package in packages)

  def find_spec(self, fullname, path=None, target=None):
    if not f"{fullname}.".startswith(self._packages):
      return None
    spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
    if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
      spec.loader = _Loader(spec.loader.name, spec.loader.path)
    return spec
