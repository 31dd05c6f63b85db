"""Chat templates: render conversations to prompts.

A template is part of a model's files, so it is untrusted code and runs in
`research.text.sandbox`.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2

from research.text import sandbox
from research.typing import UserError

MAX_TEMPLATE = 1 << 18
"""Maximum number of characters of a template; long ones have about 20,000."""


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
  return sandbox.environment().from_string(template)


def render(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  add_generation_prompt: bool = True,
  names: Mapping[str, Any] | None = None,
) -> str:
  """Renders a conversation to a prompt.

  Args:
    template: a Jinja template, as in Hugging Face tokenizers.
    messages: `{"role": ..., "content": ...}`, in order.
    add_generation_prompt: whether to append the start of an assistant turn.
    names: further template variables, e.g. `bos_token`, `tools`.

  Raises:
    UserError: the template does not parse, fails, calls `raise_exception`, or
      exceeds a limit of the sandbox.
  """
  names = {"add_generation_prompt": add_generation_prompt, **(names or {})}
  return _rendered(sandbox.render, template, messages, names)


def render_marked(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  names: Mapping[str, Any] | None = None,
) -> tuple[str, list[tuple[int, int]]] | None:
  """Renders a conversation and locates the assistant's text.

  Args:
    template, messages, names: as for `render`.

  Returns:
    The text and the (start, end) spans that the template marks with
    `{% generation %}`, or None if it has no such blocks.

  Raises:
    UserError: as for `render`.
  """
  if not _marks(template):
    return None
  names = {"add_generation_prompt": False, **(names or {})}
  return _rendered(sandbox.render_marked, template, messages, names)


def leaves_out_texts(template: str, names: Mapping[str, Any]) -> bool:
  """Whether a template takes messages in parts, and leaves out those of texts.

  Those of LLaVA and of SmolVLM do.

  Args:
    template, names: as for `render`.
  """
  one, other, parts = (
    _of_user(template, names, content)
    for content in ("1", "2", _parts("1", None))
  )
  return one == other and parts is not None and parts != one


def image_mark(template: str, names: Mapping[str, Any]) -> str | None:
  """Returns what a template writes for an image in a message of parts.

  White space around it is not part of it: InternVL's has a newline behind each
  image, which belongs to the text. None if it takes no parts, or images change
  more than their own place.

  Args:
    template, names: as for `render`.
  """
  word = "\ue000"  # of no template, and no letter
  text, image = (
    _of_user(template, names, [part])
    for part in ({"type": "text", "text": word}, {"type": "image"})
  )
  if text is None or image is None or word not in text:
    return None
  before, _, after = text.partition(word)
  around = image.startswith(before) and image.endswith(after)
  mark = image[len(before) : len(image) - len(after)].strip()
  return mark if around and mark else None


def _of_user(
  template: str, names: Mapping[str, Any], content: Any
) -> str | None:
  """Returns a user's message as it is rendered; None if that fails."""
  try:
    message = {"role": "user", "content": content}
    return render(template, [message], names=names)
  except UserError:
    return None


def with_texts(
  messages: Sequence[Mapping[str, Any]], change: Callable[[str], Any]
) -> list[dict[str, Any]]:
  """Returns messages with each content that is a text changed."""
  return [
    {**x, "content": change(x["content"])}
    if isinstance(x.get("content"), str)
    else dict(x)
    for x in messages
  ]


def in_parts(
  messages: Sequence[Mapping[str, Any]], image: str | None = None
) -> list[dict[str, Any]]:
  """Returns messages of parts for such a template.

  Args:
    messages: what each says is a text, parts, or nothing.
    image: where there is an image in a text; None if there is none.
  """
  return with_texts(messages, lambda text: _parts(text, image))


def _parts(content: str, image: str | None) -> list[dict[str, str]]:
  out: list[dict[str, str]] = []
  texts = [content] if image is None else content.split(image)
  for number, text in enumerate(texts):
    out += [{"type": "image"}] if number else []
    out += [{"type": "text", "text": text}] if text else []
  return out


@functools.lru_cache(maxsize=16)
def _marks(template: str) -> bool:
  with _readable(template):
    return sandbox.has_generation_blocks(template)


def _rendered(render, template, messages, names):
  context = {
    "messages": [dict(message) for message in messages],
    "tools": None,
    "documents": None,
  } | dict(names)
  with _readable(template):
    return render(_compiled(template), context)


@contextlib.contextmanager
def _readable(template: str) -> Iterator[None]:
  """Converts any error of a template to a UserError."""
  if len(template) > MAX_TEMPLATE:
    raise UserError(
      f"chat template: found {len(template):,} characters, expected at most "
      f"{MAX_TEMPLATE:,}"
    )
  try:
    yield
  except sandbox.LimitExceeded as error:
    raise UserError(
      f"chat template: exceeds a limit: {error}; it was stopped.\n"
      "Use a template that you trust, or generate without --chat."
    ) from error
  except jinja2.TemplateSyntaxError as error:
    raise UserError(
      f"chat template, line {error.lineno}: {error.message}"
    ) from error
  except (jinja2.TemplateError, jinja2.exceptions.SecurityError) as error:
    raise UserError(f"chat template: {error.message}") from error
  except RecursionError as error:
    raise UserError("chat template: is nested too deeply") from error
  except Exception as error:  # errors of the template's own expressions
    raise UserError(f"chat template: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def find(directory: pathlib.Path, config: Mapping[str, Any]) -> str | None:
  """Finds the chat template in a tokenizer's files; None if there is none.

  Args:
    directory: may contain `chat_template.jinja` (or the older `.json`), which
      take precedence, as in transformers.
    config: `tokenizer_config.json`, whose `chat_template` is one template or a
      list of named ones, of which `default` is used.

  Raises:
    UserError: a file is malformed.
  """
  separate = directory / "chat_template.jinja"
  if separate.is_file():
    with separate.open(encoding="utf-8", errors="replace") as file:
      return file.read(MAX_TEMPLATE + 1)
  older = directory / "chat_template.json"
  found = config.get("chat_template")
  if older.is_file():
    found = _fields(older).get("chat_template", found)
  if found is None or isinstance(found, str):
    return found
  try:
    named = {entry["name"]: entry["template"] for entry in found}
    template = named.get("default")
  except (TypeError, KeyError) as error:
    raise UserError(
      f"{directory}/tokenizer_config.json: chat_template: expected a text, or "
      'a list of {"name", "template"}'
    ) from error
  if not isinstance(template, str | None):
    raise UserError(
      f"{directory}/tokenizer_config.json: chat_template: found a "
      f"{type(template).__name__}, expected a text"
    )
  return template


def _fields(path: pathlib.Path) -> Mapping[str, Any]:
  try:
    found = json.loads(path.read_text("utf-8"))
  except ValueError as error:
    raise UserError(f"{path}: is not JSON: {error}") from error
  return found if isinstance(found, dict) else {}
