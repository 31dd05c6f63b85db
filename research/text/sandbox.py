"""Sandboxed Jinja environment for untrusted chat templates.

Jinja's immutable sandbox already rejects mutation and attributes that start
with an underscore, but does not limit work. This one also limits the number of
executed lines and the size of all strings and lists, and rejects operations
whose result can have any size (`test_chat.py`
renders with and without).
"""

import datetime
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, no_type_check

import jinja2
from jinja2 import compiler, ext, nodes
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SIZE = 1 << 22
"""Maximum characters of a string (also the output) or elements of a list."""

MAX_STEPS = 1 << 19
"""Maximum number of compiled template lines that a rendering may execute."""

_MARKS = "marks made"
"""Context variable for the texts of `{% generation %}` blocks; templates cannot
access it because of the space in its name."""

_SAFE = """
abs count d default dictsort first float int items last length list map max min
reject rejectattr reverse select selectattr sort unique
"""
_OF_TEXT = "capitalize lower safe string title trim upper"
_GROWING = "center expandtabs format format_map ljust rjust translate zfill"
"""String methods whose result can have any size; chat templates need none."""


class LimitExceeded(Exception):
  """A rendering exceeded one of the limits."""


class _Marked(str):
  """Text inside a `{% generation %}` block."""


class _Generation(ext.Extension):
  """The tag `{% generation %}`, which marks the assistant's text."""

  tags = {"generation"}

  def parse(self, parser: Any) -> Any:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("mark", [nodes.ContextReference()])
    return nodes.CallBlock(call, [], [], body).set_lineno(line)

  def mark(self, context: Any, caller: Callable[[], str]) -> str:
    """Returns the text of the block and records it."""
    text = _Marked(caller())
    context[_MARKS].append(text)
    return text


@no_type_check
def _bound(size: int) -> None:
  if size > MAX_SIZE:
    raise LimitExceeded(f"more than {MAX_SIZE:,} characters")


@no_type_check
def _measured(x: Any) -> Any:
  """Returns `x` if its text, with aliases expanded, is within the limit."""
  size, rest = 0, [x]
  while rest:
    x_ = rest.pop()
    size += 3  # an element and its separator
    if isinstance(x_, str | bytes):
      size += len(x_)
    elif isinstance(x_, dict):
      rest += [*x_.keys(), *x_.values()]
    elif isinstance(x_, list | tuple | set):
      rest += x_
    _bound(size + len(rest))
  return x


@no_type_check
def _text(x: Any) -> str:
  return x if isinstance(x, str) else str(_measured(x))


@no_type_check
def _concatenated(pieces: Iterable[Any]) -> str:
  out, size = [], 0
  for piece in pieces:
    out.append(_text(piece))
    size += len(out[-1])
    _bound(size)
  return "".join(out)


def _joined(separator: str, items: Iterable[Any]) -> str:
  def pieces():
    for i, item in enumerate(items):
      if i:
        yield separator
      yield item

  return _concatenated(pieces())


def _replaced(text: Any, old: Any, new: Any, count: int = -1) -> str:
  text, old, new = _text(text), _text(old), _text(new)
  _bound(len(text) + text.count(old) * len(new))
  return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_environment
def _join_filter(environment, value, d="", attribute=None):
  get = environment.getitem
  items = value if attribute is None else (get(x, attribute) for x in value)
  return _joined(_text(d), items)


def _tojson(
  x: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: Any = None,
  sort_keys: bool = False,
) -> str:
  """Returns JSON as in Hugging Face templates, without HTML escapes."""
  if indent is not None and not 0 <= int(indent) <= 16:
    raise LimitExceeded("an indentation of more than 16")
  return json.dumps(
    _measured(x),
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise_exception(message: Any) -> None:
  raise TemplateError(_text(message))


def _strftime_now(form: str) -> str:
  if len(form) > 64:
    raise LimitExceeded("a date of more than 64 characters")
  return datetime.datetime.now().strftime(form)


class _Generator(compiler.CodeGenerator):
  """Compiles `a ~ b` to a call with a size limit."""

  def visit_Concat(self, node, frame):
    self.write("environment.concat((")
    for operand in node.nodes:
      self.visit(operand, frame)
      self.write(", ")
    self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset(("+", "*", "**", "%"))
  code_generator_class = _Generator
  concat = staticmethod(_concatenated)

  def call_binop(self, context, operator, left, right):
    sizes = [len(x) for x in (left, right) if hasattr(x, "__len__")]
    if sizes and operator == "%":
      raise LimitExceeded("%-formatting, which no chat needs")
    if operator == "**":
      raise LimitExceeded("a power, which no chat needs")
    if sizes and operator == "*":
      times = [x for x in (left, right) if isinstance(x, int)]
      sizes = [sizes[0] * max(times, default=1)]
    _bound(sum(sizes))
    numbers = [x for x in (left, right) if isinstance(x, int)]
    if any(x.bit_length() > 64 for x in numbers):
      raise LimitExceeded("an integer of more than 64 bits")
    return super().call_binop(context, operator, left, right)

  def call(self, context, obj, *args, **kwargs):
    owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
    if isinstance(owner, str):
      if name in _GROWING.split():
        raise LimitExceeded(f"str.{name}, which no chat needs")
      if name == "join":
        return _joined(owner, *args)
      if name == "replace":
        return _replaced(owner, *args, **kwargs)
    return super().call(context, obj, *args, **kwargs)


def _of_text(f: Callable[..., Any]) -> Callable[..., Any]:
  return lambda x, *args: f(_text(x), *args)


def environment() -> jinja2.Environment:
  """Returns the sandboxed environment, including Hugging Face's helpers."""
  out = _Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[ext.loopcontrols, _Generation],
    finalize=_measured,
  )
  known = out.filters
  out.filters = (
    {name: known[name] for name in _SAFE.split()}
    | {name: _of_text(known[name]) for name in _OF_TEXT.split()}
    | {"join": _join_filter, "replace": _replaced, "tojson": _tojson}
  )
  names = ("range", "dict", "namespace")
  out.globals = {name: out.globals[name] for name in names}
  out.globals |= dict(
    raise_exception=_raise_exception, strftime_now=_strftime_now
  )
  return out


def has_generation_blocks(template: str) -> bool:
  """Returns whether a template contains a `{% generation %}` block."""
  tokens = [t for t in environment().lex(template) if t[1] != "whitespace"]
  return any(
    begin[1] == "block_begin" and name[1:] == ("name", "generation")
    for begin, name in itertools.pairwise(tokens)
  )


def render(template: jinja2.Template, names: dict[str, Any]) -> str:
  """Renders a template.

  Args:
    template: from this module's `environment().from_string`.
    names: template variables.

  Raises:
    LimitExceeded: the template exceeds a limit.
  """
  return _rendered(template, names)[0]


def render_marked(
  template: jinja2.Template, names: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
  """Renders a template and locates its `{% generation %}` blocks.

  Args:
    template, names: as for `render`.

  Returns:
    The text, and the (start, end) span of each block.

  Raises:
    LimitExceeded: the template exceeds a limit.
    TemplateError: a block is inside a variable or a macro, so its position in
      the text is unknown.
  """
  text, spans, made = _rendered(template, names)
  if len(spans) != made:
    raise TemplateError("{% generation %} is inside a variable or a macro")
  return text, spans


def _rendered(template, names) -> tuple[str, list[tuple[int, int]], int]:
  """Returns the text, the marked spans, and the number of rendered blocks."""
  made: list[str] = []
  context = template.new_context({**names, _MARKS: made})
  spans, place = [], 0

  def placed():
    nonlocal place
    for piece in template.root_render_func(context):
      piece = _text(piece)
      if isinstance(piece, _Marked):
        spans.append((place, place + len(piece)))
      place += len(piece)
      yield piece

  return _traced(lambda: _concatenated(placed())), spans, len(made)


def _traced(work: Callable[[], str]) -> str:
  """Runs `work()` with a limit on the number of template lines."""
  steps = 0

  @no_type_check  # called for every line; a type-checked call costs 30 us
  def count(frame, event, argument):
    nonlocal steps
    if frame.f_code.co_filename != "<template>":
      return None
    steps += 1
    if steps > MAX_STEPS:
      raise LimitExceeded(f"more than {MAX_STEPS:,} steps")
    return count

  before = sys.gettrace()
  sys.settrace(count)
  try:
    return work()
  finally:
    sys.settrace(before)
