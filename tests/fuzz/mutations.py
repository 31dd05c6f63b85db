"""Damaging files, deterministically: the same seed, the same bytes."""

import copy
import json
import random
import struct
from typing import Any

_WORDS = [0, 1, 2, 7, 8, 31, 32, 255, 256, 65535, 2**16, 2**31 - 1, 2**31]
_WORDS += [2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
VALUES: tuple[Any, ...] = (
  *(None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 1e308, 1e-320, 10**30),
  *(2**24, 2**31, 2**63, -(2**63), "", "a", "\x00", "\ud7ff", "x" * 5000),
  *("(", "[", ".*", "(a+)+$", "../../etc/passwd", "/dev/zero", "__class__"),
  *([], {}, [[]], [None], [1, 2], ["a"], {"": {}}, {"type": "BPE"}),
  *([[[[[[[[[[]]]]]]]]]], list(range(300)), {str(i): i for i in range(300)}),
)
"""What a field of JSON may be found to be."""


def _flip(r: random.Random, data: bytearray, other: bytes) -> bytearray:
  for _ in range(r.choice((1, 1, 2, 8, 64))):
    data[r.randrange(len(data))] ^= 1 << r.randrange(8)
  return data


def _set(r: random.Random, data: bytearray, other: bytes) -> bytearray:
  data[r.randrange(len(data))] = r.choice((0, 1, 32, 34, 123, 127, 128, 255))
  return data


def _cut(r: random.Random, data: bytearray, other: bytes) -> bytearray:
  return data[: r.randrange(len(data))]


def _delete(r: random.Random, data: bytearray, other: bytes) -> bytearray:
  start = r.randrange(len(data))
  del data[start : start + r.choice((1, 2, 8, 64, 1000))]
  return data


def _repeat(r: random.Random, data: bytearray, other: bytes) -> bytearray:
  start = r.randrange(len(data))
  piece = data[start : start + r.choice((1, 4, 16, 256))]
  return data[:start] + piece * r.choice((1, 2, 50)) + data[start:]


def _splice(r: random.Random, data: bytearray, other: bytes) -> bytearray:
  start, begin = r.randrange(len(data)), r.randrange(len(other))
  piece = other[begin : begin + r.choice((4, 32, 512, 4096))]
  if r.random() < 0.5:  # in place, so that what follows keeps its offset
    return data[:start] + piece + data[start + len(piece) :]
  return data[:start] + piece + data[start:]


def _word(r: random.Random, data: bytearray, other: bytes) -> bytearray:
  """Overwrites what may be a length, a count or an offset.

  Mostly in the first part of the file, where headers are.
  """
  form = r.choice(("<I", "<Q", "<Q"))
  size = struct.calcsize(form)
  end = len(data) - size
  if end <= 0:
    return data
  limit = r.choice((min(end, 64), min(end, 2048), end))
  at = r.randrange(limit + 1)
  old = struct.unpack_from(form, data, at)[0]
  new = r.choice((r.choice(_WORDS), old + 1, old - 1, old * 2, old ^ 1 << 31))
  struct.pack_into(form, data, at, new % 256**size)
  return data


_BYTES = (_flip, _set, _cut, _delete, _repeat, _splice, _word, _word)


def of_bytes(r: random.Random, data: bytes, other: bytes = b"") -> bytes:
  """Returns `data` with one to three kinds of damage.

  Args:
    r: decides.
    data: the whole file.
    other: another one, to take pieces from.
  """
  out = bytearray(data)
  for _ in range(r.choice((1, 1, 1, 2, 3))):
    if out:
      out = r.choice(_BYTES)(r, out, other or data)
  return bytes(out)


def _value(r: random.Random) -> Any:
  # A copy: what is put into a file may be changed there again.
  return copy.deepcopy(r.choice(VALUES))


def _places(x: Any, path: tuple = ()) -> list[tuple]:
  found = [path] if path else []
  if isinstance(x, dict):
    for key, value in x.items():
      found += _places(value, (*path, key))
  if isinstance(x, list):
    for i, value in enumerate(x[:20]):
      found += _places(value, (*path, i))
  return found


def of_json(r: random.Random, data: bytes) -> bytes:
  """Returns a JSON file with other values, or damaged as text.

  Half of the files stay valid JSON: what is wrong is what they say.
  """
  kind = r.random()
  if kind < 0.25:
    return of_bytes(r, data)
  if kind < 0.3:
    return r.choice(
      (
        b"[" * r.choice((100, 100_000)),
        b'{"a":' * r.choice((100, 50_000)),
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a": NaN}',
        b'{"a": "\xff\xfe"}',
        b"null",
        b"",
        b"\xef\xbb\xbf" + data,
        data.decode("utf-8").encode("utf-16"),
        data.replace(b"{", b'{"model_type": 1, "model_type": 2, ', 1),
      )
    )
  value = json.loads(data)
  for _ in range(r.choice((1, 1, 2, 4))):
    places = _places(value)
    if not places:
      break
    *above, last = r.choice(places)
    holder = value
    for key in above:
      holder = holder[key]
    action = r.random()
    if action < 0.2:
      del holder[last]
    elif action < 0.3 and isinstance(holder, dict):
      holder[r.choice(("extra", "use_dora", "quantization_config", ""))] = (
        _value(r)
      )
    elif action < 0.45 and isinstance(holder[last], int | float):
      old = holder[last]
      holder[last] = r.choice((old + 1, old - 1, -old, old * 1000, str(old)))
    else:
      holder[last] = _value(r)
  return json.dumps(value).encode()


def of_header(r: random.Random, data: bytes) -> bytes:
  """Returns a safetensors file whose JSON header says something else."""
  length = int.from_bytes(data[:8], "little")
  header = of_json(r, data[8 : 8 + length])
  size = len(header) if r.random() < 0.8 else r.choice(_WORDS)
  return (size % 2**64).to_bytes(8, "little") + header + data[8 + length :]


def of_lines(r: random.Random, data: bytes) -> bytes:
  """Returns a file of JSON lines, some of them damaged."""
  if r.random() < 0.3:
    return of_bytes(r, data)
  lines = data.splitlines()
  for _ in range(r.choice((1, 1, 3))):
    i = r.randrange(len(lines))
    lines[i] = r.choice(
      (of_json(r, lines[i]), lines[i] * 2, b"", b"x" * 100_000, lines[i][:-1])
    )
    if not _is_json(lines[i]):
      break
  return r.choice((b"\n", b"\r\n", b"\n\n")).join(lines)


def _is_json(data: bytes) -> bool:
  try:
    json.loads(data)
  except (ValueError, RecursionError):
    return False
  return True


def of_gin(r: random.Random, data: bytes) -> bytes:
  """Returns a gin file with other values, names or lines."""
  if r.random() < 0.35:
    return of_bytes(r, data)
  lines = data.decode().splitlines()
  for _ in range(r.choice((1, 1, 2))):
    i = r.randrange(len(lines))
    name, equals, _ = lines[i].partition("=")
    values = ("1", "-1", "1.5", "'x'", "None", "[1, 2]", "{'a': 1}", "(", "%X")
    values += ("%STEPS", "@adapt.Adapt", "@nothing()", "10**9", "'" + "x" * 999)
    values += ("@experiment.Experiment()", '"', "1e400", "[" * 200, "True")
    if equals and r.random() < 0.7:
      lines[i] = f"{name}= {r.choice(values)}"
    else:
      lines[i] = r.choice(
        (
          lines[i] * 2,
          lines[i][::-1],
          "include 'nothing.gin'",
          "include 'runs/quickstart.gin'",
          "from nowhere import nothing",
          "experiment.Experiment.nothing = 1",
          "a/b/c.d = 1",
          "x" * 10_000,
        )
      )
  return "\n".join(lines).encode()


_HOSTILE = (
  "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  "{{ messages[0]['__class__'] }}",
  "{{ raise_exception.__globals__ }}",
  "{{ cycler.__init__.__globals__.os.environ }}",
  "{{ self._TemplateReference__context }}",
  "{{ messages | map(attribute='__class__') | list }}",
  "{{ '{0.__class__}'.format(1) }}",
  "{{ 'x' * N }}",
  "{{ [0] * N }}",
  "{{ range(N) | list | length }}",
  "{{ N ** N }}",
  "{{ '%Nd' % 1 }}",
  "{{ 'x' | center(N) }}",
  "{{ ('x' * 10000).replace('x', 'x' * 10000) }}",
  "{% for i in range(N) %}BODY{% endfor %}",
  "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}"
  "{% endfor %}",
  "{% macro f(n) %}BODY{{ f(n) }}{% endmacro %}{{ f(1) }}",
  "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
  "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
  "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
  "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
  "{% include '/etc/passwd' %}",
  "{{ messages | tojson(indent=N) }}",
  "{{ strftime_now('%Y' * N) }}",
  "{{ lipsum(N) }}",
  "{{ dict(a=messages).items() | list }}",
  "{% if BODY %}x{% endif %}",
  "{{ " + "(" * 400 + "1" + ")" * 400 + " }}",
)


def of_template(r: random.Random, data: bytes) -> bytes:
  """Returns a chat template with attacks in it, nested and combined."""
  if r.random() < 0.2:
    return of_bytes(r, data)

  def attack(depth: int) -> str:
    text = r.choice(_HOSTILE)
    body = attack(depth - 1) if depth and r.random() < 0.6 else "x"
    size = str(r.choice((3, 1000, 10**6, 10**9, 10**30)))
    return text.replace("N", size).replace("BODY", body)

  parts = [attack(3) for _ in range(r.choice((1, 1, 2)))]
  if r.random() < 0.5:
    parts.insert(r.randrange(2), data.decode())
  return "".join(parts).encode()
