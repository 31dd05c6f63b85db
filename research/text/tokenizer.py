"""Tokenizers: encoding, decoding, streaming, chat templates, stop strings."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from research.text import chat
from research.text.special_tokens import SpecialTokens
from research.typing import UserError

MAX_JSON = 1 << 28
"""Maximum size of a tokenizer file in bytes; large ones have about 35 MB."""

_TYPED = "\ufdd1"
"""The first character of a typed mark, while a template renders it: a
noncharacter of Unicode."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
  """Converts text to token ids and back.

  Attributes:
    backend: the `tokenizers.Tokenizer` that does the work.
    bos, eos, pad: ids of these special tokens, or None.
    stop: ids that end generation.
    add_bos: whether documents begin with `bos` although the backend's
      post-processor does not add it (as GGUF files may specify).
    add_eos: whether documents end with `eos`, likewise.
    documents: the special tokens around documents that a training run recorded;
      None for the tokenizer's own.
    chat_template: a Jinja template, or None.
  """

  backend: Any
  bos: int | None = None
  eos: int | None = None
  pad: int | None = None
  stop: tuple[int, ...] = ()
  add_bos: bool = False
  add_eos: bool = False
  documents: SpecialTokens | None = None
  chat_template: str | None = None

  @classmethod
  def from_directory(cls, directory: str | os.PathLike) -> "Tokenizer":
    """Returns the tokenizer of a Hugging Face directory.

    Raises:
      UserError: `tokenizer.json` is missing, or a file is malformed.
    """
    return _from_directory(pathlib.Path(directory))

  @classmethod
  def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
    """Returns the tokenizer in the metadata of a GGUF file."""
    return _from_gguf(metadata)

  @property
  def vocab_size(self) -> int:
    """The number of ids, including added tokens."""
    return self.backend.get_vocab_size(with_added_tokens=True)

  @property
  def special(self) -> SpecialTokens:
    """The special tokens around a document."""
    return self.own_special if self.documents is None else self.documents

  @functools.cached_property
  def own_special(self) -> SpecialTokens:
    """The tokenizer's own special tokens; initial ones go in every row."""
    begin, end = _added(self.backend)
    if self.add_bos and self.bos is not None and not begin:
      begin = (self.bos,)
    if self.add_eos and self.eos is not None and not end:
      end = (self.eos,)
    return SpecialTokens(begin, end, every_row=bool(begin))

  def encode(self, text: str, add_special: bool = False) -> list[int]:
    """Returns the ids of `text`.

    Args:
      text: the text; special tokens in it become their ids.
      add_special: whether to add the special tokens around a document (often a
        `bos` before it).
    """
    ids = self.backend.encode(text, add_special_tokens=False).ids
    return self.special.document(ids) if add_special else ids

  def encode_after(self, before: Sequence[int], text: str) -> list[int]:
    """Returns the ids of a text that others come before, as of both as one.

    Some tokenizers put a blank before a text, as Llama 2's does. Here it is
    left out, unless they put one behind the last id, a special token.

    Args:
      before: ids of the text before.
      text: special tokens in it become their ids.
    """
    ids, inner = self.encode(text), self._without_prefix
    if inner is self.backend or not before:
      return ids
    added = inner.get_added_tokens_decoder()
    if before[-1] in added:
      return self.encode(added[before[-1]].content + text)[1:]
    within = inner.encode(text, add_special_tokens=False).ids
    # Behind a special token of its own, a text is as it is alone.
    parts = (
      (i for i, x in enumerate(xs) if x in added) for xs in (within, ids)
    )
    first, second = (next(places, None) for places in parts)
    return within if first is None else within[:first] + ids[second:]

  def prompt(self, text: str) -> list[int]:
    """Returns the ids of a text for the model to continue.

    Adds the special tokens before a document, but not those after it.
    """
    return self.special.prompt(self.encode(text))

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Returns the text of `ids`; invalid UTF-8 becomes U+FFFD."""
    return self.backend.decode(list(ids), skip_special_tokens=skip_special)

  def chat(
    self,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    image: str | None = None,
  ) -> str:
    """Renders a conversation to a prompt; encode it without special tokens.

    Args:
      messages: `{"role": ..., "content": ...}`, in order. Texts become parts
        for a template that would leave them out, or that writes more of an
        image in a part than of one in a text.
      add_generation_prompt: whether to append the start of an assistant turn.
      image: what stands for an image in a text, and in the result; None if
        nothing does.

    Raises:
      UserError: there is no chat template, or it fails.
    """
    template, names = self._template()
    messages, restored = self._in_its_form(messages, image)
    return restored(
      chat.render(template, messages, add_generation_prompt, names)
    )

  def chat_marked(
    self, messages: Sequence[Mapping[str, Any]], image: str | None = None
  ) -> tuple[str, list[tuple[int, int]]] | None:
    """Renders a conversation; returns the text and the assistant's spans.

    Returns None if the chat template does not mark them.

    Args:
      messages, image: as for `chat`.

    Raises:
      UserError: there is no chat template, or it fails.
    """
    template, names = self._template()
    messages, restored = self._in_its_form(messages, image)
    found = chat.render_marked(template, messages, names)
    if found is None:
      return None
    text, spans = found
    # The template's mark of an image may be of another length than ours.
    places = [tuple(len(restored(text[:i])) for i in span) for span in spans]
    return restored(text), places

  def _in_its_form(
    self, messages: Sequence[Mapping[str, Any]], image: str | None
  ) -> tuple[Sequence[Mapping[str, Any]], Callable[[str], str]]:
    """Returns messages as the template takes them, and what reads its images.

    That puts `image` in the place of the template's mark of one, which stays
    text where somebody typed it.

    Args:
      messages, image: as for `chat`.
    """
    said = (str(message.get("content")) for message in messages)
    images = image is not None and any(image in text for text in said)
    mark = self._image_mark if images else None
    if mark is None or mark == image:
      parts = mark or self._takes_parts
      return chat.in_parts(messages, image) if parts else messages, str
    typed = _TYPED + mark[1:]

    def escaped(text: str) -> str:
      return image.join(x.replace(mark, typed) for x in text.split(image))

    def restored(text: str) -> str:
      return text.replace(mark, image).replace(typed, mark)

    messages = chat.with_texts(messages, escaped)
    return chat.in_parts(messages, image), restored

  @functools.cached_property
  def _without_prefix(self) -> Any:
    """The backend without a blank before texts; itself if it puts none."""
    return _without_prefix(self.backend)

  @functools.cached_property
  def _takes_parts(self) -> bool:
    return chat.leaves_out_texts(*self._template())

  @functools.cached_property
  def _image_mark(self) -> str | None:
    return chat.image_mark(*self._template())

  def _template(self) -> tuple[str, dict[str, str]]:
    if self.chat_template is None:
      raise UserError(
        "this model has no chat template: generate without --chat"
      )
    names = {
      f"{name}_token": "" if i is None else self.backend.id_to_token(i)
      for name, i in (("bos", self.bos), ("eos", self.eos), ("pad", self.pad))
    }
    return self.chat_template, names


def _added(backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the ids that the backend's post-processor puts around a text."""
  for text in ("a", "0", "A"):
    try:
      inside = backend.encode(text, add_special_tokens=False).ids
    except Exception:  # the library's: a vocabulary of words lacks this one
      continue
    whole = backend.encode(text, add_special_tokens=True).ids
    # `inside` is empty if the vocabulary lacks the letter.
    for i in range(len(whole) - len(inside) + 1 if inside else 0):
      if whole[i : i + len(inside)] == inside:
        return tuple(whole[:i]), tuple(whole[i + len(inside) :])
  return (), ()


def _without_prefix(backend: Any) -> Any:
  """Returns a backend that puts no blank before a text, or `backend` itself."""
  if not isinstance(backend, tokenizers.Tokenizer):
    return backend
  whole = json.loads(backend.to_str())
  steps = {k: whole[k] for k in ("normalizer", "pre_tokenizer")}
  without = {k: _step_without_prefix(step) for k, step in steps.items()}
  if without == steps:
    return backend
  return tokenizers.Tokenizer.from_str(json.dumps(whole | without))


def _step_without_prefix(step: Any) -> Any:
  """Returns a step of a tokenizer, as JSON, without a blank before a text."""
  match step:
    case {"type": "Prepend"}:
      return None
    case {"type": "Metaspace"}:
      return step | {"prepend_scheme": "never"}
    case {"type": "ByteLevel"}:
      return step | {"add_prefix_space": False}
    case {"type": "Sequence"}:
      name = "normalizers" if "normalizers" in step else "pretokenizers"
      steps = map(_step_without_prefix, step[name])
      return step | {name: [x for x in steps if x is not None]}
  return step


class StreamDecoder:
  """Decodes a stream of ids to text, without splitting characters.

  The concatenated pieces equal `decode` of all ids. Text is buffered while the
  bytes of its last character may be incomplete. The ids of the previous piece
  are decoded again together with the new ones, since some decoders treat the
  first id of a text differently.

  `DecodeStream` of `tokenizers` (0.23) would hold bytes that are not UTF-8 back
  for ever, and does not give them out at the end (`test_tokenizer.py`).
  """

  _LONGEST = 4  # maximum number of bytes, so tokens, of a UTF-8 character

  def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
    self._decode = lambda ids: tokenizer.decode(ids, skip_special)
    self._before: list[int] = []
    self._waiting: list[int] = []

  def feed(self, ids: Iterable[int]) -> str:
    """Returns the text that `ids` complete, possibly empty."""
    return "".join(self._feed(i) for i in ids)

  def flush(self) -> str:
    """Returns the buffered text, at the end of the stream."""
    return self._release(len(self._waiting))

  def _feed(self, i: int) -> str:
    self._waiting.append(i)
    if not self._text(self._waiting).endswith("\ufffd"):
      return self._release(len(self._waiting))
    # Invalid or incomplete UTF-8: release the part that later bytes cannot
    # change, up to a point where both parts decode separately as together.
    if len(self._waiting) > 2 * self._LONGEST:
      whole = self._text(self._waiting)
      for cut in range(len(self._waiting) - self._LONGEST, 0, -1):
        first, rest = self._waiting[:cut], self._waiting[cut:]
        if self._text(first) + self._decode(rest) == whole:
          return self._release(cut)
    return ""

  def _text(self, ids: list[int]) -> str:
    start = self._decode(self._before)
    return self._decode(self._before + ids)[len(start) :]

  def _release(self, n: int) -> str:
    text = self._text(self._waiting[:n])
    if n:
      # Behind ids without text, such as special ones, a text has not begun
      # anew: its next id still follows the ids before them.
      kept = [] if text else self._before
      self._before = kept + self._waiting[:n]
      self._waiting = self._waiting[n:]
    return text


class StopStrings:
  """Truncates a stream of text before the first stop string.

  Text that may be the beginning of a stop string is buffered, so a stop string
  is found even if it is split between pieces.
  """

  def __init__(self, stops: Sequence[str]):
    if not all(stops):
      raise UserError("--stop: found an empty string, expected some text")
    self._stops = tuple(stops)
    self._held = ""
    self.found = False

  def feed(self, piece: str) -> str:
    """Returns text that cannot be part of a stop string."""
    if self.found:
      return ""
    text = self._held + piece
    starts = [i for s in self._stops if (i := text.find(s)) >= 0]
    if starts:
      self.found, self._held = True, ""
      return text[: min(starts)]
    keep = max((_overlap(text, s) for s in self._stops), default=0)
    self._held = text[len(text) - keep :]
    return text[: len(text) - keep]

  def flush(self) -> str:
    """Returns the buffered text, at the end of the stream."""
    text, self._held = self._held, ""
    return text


def _overlap(text: str, stop: str) -> int:
  """Returns the length of the longest suffix of `text` that begins `stop`."""
  for n in range(min(len(text), len(stop) - 1), 0, -1):
    if text.endswith(stop[:n]):
      return n
  return 0


def _from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
  from research.text import gguf_tokenizer

  backend, special = gguf_tokenizer.tokenizer_from_gguf(metadata)
  return Tokenizer(
    backend=backend,
    bos=special.get("bos"),
    eos=special.get("eos"),
    pad=special.get("pad"),
    stop=special["stop"],
    add_bos=bool(special.get("add_bos")),
    add_eos=bool(special.get("add_eos")),
    chat_template=special.get("chat_template"),
  )


def _from_directory(directory: pathlib.Path) -> Tokenizer:
  path = directory / "tokenizer.json"
  if not path.is_file():
    raise UserError(
      f"{path}: no such file.\n"
      "A fast tokenizer is needed; transformers' save_pretrained writes one."
    )
  try:
    backend = tokenizers.Tokenizer.from_str(_text(path))
  except UserError:
    raise
  except Exception as error:  # the library raises bare Exceptions
    raise UserError(
      f"{path}: is not a tokenizer: {str(error)[:200]}"
    ) from error
  # Padding and truncation are done elsewhere.
  backend.no_padding()
  backend.no_truncation()
  config = _json(directory / "tokenizer_config.json")
  special = _json(directory / "special_tokens_map.json") | config

  def find(name: str) -> int | None:
    token = special.get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(token) if isinstance(token, str) else None

  eos = find("eos")
  return Tokenizer(
    backend=backend,
    bos=find("bos"),
    eos=eos,
    pad=find("pad"),
    stop=_stop(directory, eos),
    add_bos=config.get("add_bos_token") is True,
    add_eos=config.get("add_eos_token") is True,
    chat_template=chat.find(directory, config),
  )


def _stop(directory: pathlib.Path, eos: int | None) -> tuple[int, ...]:
  """Returns the ids that end a text, from the tokenizer's and model's files."""
  found = [] if eos is None else [eos]
  for name in ("generation_config.json", "config.json"):
    ids = _json(directory / name).get("eos_token_id")
    if ids is None:
      continue
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and i >= 0 for i in ids):
      raise UserError(
        f"{directory / name}: eos_token_id: found {ids!r}, expected an id or "
        "a list of ids"
      )
    found += ids
    break
  return tuple(dict.fromkeys(found))


def _text(path: pathlib.Path) -> str:
  size = path.stat().st_size
  if size > MAX_JSON:
    raise UserError(f"{path}: found {size:,} bytes, at most {MAX_JSON:,}")
  try:
    return path.read_text("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: is not UTF-8 at byte {error.start}") from error


def _json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object in a JSON file; {} if the file does not exist."""
  if not path.is_file():
    return {}
  text = _text(path)
  try:
    found = json.loads(text)
  except (ValueError, RecursionError) as error:
    # ValueError includes integers with thousands of digits.
    raise UserError(f"{path}: is not JSON: {error}") from error
  if not isinstance(found, dict):
    raise UserError(f"{path}: found a {type(found).__name__}, not an object")
  return found
