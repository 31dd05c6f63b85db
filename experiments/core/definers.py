"""What defines a command's flags, a call each: name, help, then all else.

FLAGS = cli.new_flags()
define = definers(FLAGS)
_TO = define.text("to", "The file to write; it must not exist yet.")
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from absl import flags

# A flag belongs to the command that calls these, not to this module.
flags.disclaim_key_flags()

_KINDS = {
  "text": (flags.DEFINE_string, None),
  "texts": (flags.DEFINE_multi_string, []),
  "words": (flags.DEFINE_list, []),
  "choice": (flags.DEFINE_enum, None),
  "integer": (flags.DEFINE_integer, None),
  "number": (flags.DEFINE_float, None),
  "switch": (flags.DEFINE_bool, False),
}
"""What defines a kind of flag, and the default where none is named."""


def definers(values: flags.FlagValues) -> SimpleNamespace:
  """Returns a definer for each of `_KINDS`, of flags that go into `values`."""
  each = {name: _definer(*kind, values) for name, kind in _KINDS.items()}
  return SimpleNamespace(**each)


def _definer(
  define: Callable[..., flags.FlagHolder],
  usual: Any,
  values: flags.FlagValues,
) -> Callable[..., flags.FlagHolder]:
  # A lambda, since run-time type checks of functions would be absl's caller.
  return lambda name, help, default=usual, **more: define(
    name, default=default, help=help, flag_values=values, **more
  )
