"""One warp of a PTX kernel: its registers, and the effect of each instruction.

It implements the instructions that kernels of `mma` use, and raises for others.
"""

import re

import numpy as np

LANES = 32
SPACE = 1 << 40
"""Distance between buffers of global memory."""

_LANE = np.arange(LANES)
_ROW, _PAIR = _LANE // 4, _LANE % 4


class Warp:
  """One warp's registers and its copies in flight."""

  def __init__(self, block, number):
    self.block, self.registers = block, {}
    self.thread = (number * LANES + _LANE).astype(np.uint32)
    self.open, self.groups = [], []

  # Operands.

  def get(self, name, dtype):
    """Returns an operand's value, its bits read as a dtype."""
    size = np.dtype(dtype).itemsize
    if name in self.registers:
      value = self.registers[name]
    elif name.startswith("%"):
      value = np.full(LANES, self.block.special(name), np.uint32)
      value = self.thread if name == "%tid.x" else value
    elif name.startswith("0f"):
      value = np.full(LANES, int(name[2:], 16), np.uint32)
    elif name in self.block.symbols:
      value = np.full(LANES, self.block.symbols[name], np.uint64)
    else:
      value = np.full(LANES, int(name, 0) & (2 ** (8 * size) - 1), f"u{size}")
    if dtype is bool:
      return value
    return value.astype(f"u{size}").view(dtype)

  def put(self, name, value):
    bits = f"u{value.dtype.itemsize}"
    self.registers[name] = value if value.dtype == bool else value.view(bits)

  def address(self, operand):
    """Returns the address of `[%rd1+4]`."""
    base, _, offset = operand.strip("[]").partition("+")
    dtype = np.uint32 if base.startswith("%r") and base[2] != "d" else np.uint64
    if base not in self.registers:
      dtype = np.uint64
    return self.get(base, dtype).astype(np.int64) + int(offset or 0)

  def many(self, operand):
    """Returns the names in `{%r1, %r2}`."""
    return [x.strip() for x in operand.strip("{}").split(",")]

  # Running.

  def run(self):
    """Runs the warp and yields at every barrier."""
    code, labels = self.block.code, self.block.labels
    n = 0
    while n < len(code):
      opcode, operands, guard, sense = code[n]
      n += 1
      live = np.ones(LANES, bool)
      if guard is not None:
        live = self.registers[guard] == sense
      if opcode.startswith("bra"):
        assert live.all() or not live.any(), "a branch that lanes disagree on"
        n = labels[operands[0]] if live.all() else n
      elif opcode.startswith("bar"):
        yield
      elif opcode == "ret":
        return
      else:
        assert guard is None, f"{opcode} under a guard"
        self.step(opcode, operands)

  def step(self, opcode, x):
    """Executes one instruction."""
    parts = opcode.split(".")
    name = "_".join(parts[:2]).partition("::")[0]
    special = getattr(self, "_" + name, None)
    special = special or getattr(self, "_" + parts[0], None)
    if special is not None:
      special(opcode, parts, x)
      return
    if parts[-1] in ("bf16x2", "f16x2"):
      self.pairs(parts, x)
      return
    # Blackwell's pairs are two float32 in 64 bits.
    pair = parts[-1] == "f32x2"
    parts[-1] = parts[-1].removesuffix("x2")
    kind = next(p for p in reversed(parts) if re.fullmatch(r"[subf]\d+", p))
    dtype = np.dtype(f"{kind[0].replace('s', 'i').replace('b', 'u')}"
                     f"{int(kind[1:]) // 8}")  # fmt: skip
    held = np.uint64 if pair else dtype
    values = [self.get(y, held).view(dtype) for y in x[1:]]
    with np.errstate(all="ignore"):
      found = _ARITHMETIC[parts[0]](*values)
    self.put(x[0], found.astype(dtype).view(held))

  def pairs(self, parts, x):
    """Arithmetic of two 16-bit numbers in a register."""
    kind = parts[-1].removesuffix("x2")
    each = zip(
      *(_wide(self.get(y, np.uint32), kind) for y in x[1:]), strict=True
    )
    with np.errstate(all="ignore"):
      low, high = (
        _narrow(_ARITHMETIC[parts[0]](*values).astype(np.float32), kind)
        for values in each
      )
    self.put(x[0], high.astype(np.uint32) << 16 | low)

  def _fence(self, *_):
    pass

  def _elect(self, opcode, parts, x):
    value, predicate = x[0].split("|")
    self.put(value, np.zeros(LANES, np.uint32))
    self.put(predicate, _LANE == 0)

  def _ld_param(self, opcode, parts, x):
    number = int(re.search(r"param_(\d+)", x[1])[1])
    self.put(x[0], np.full(LANES, (number + 1) * SPACE, np.uint64))

  def _cvta(self, opcode, parts, x):
    self.put(x[0], self.get(x[1], np.uint64))

  def _mov(self, opcode, parts, x):
    if parts[-1] == "pred" or x[0].startswith("%p"):
      held = self.registers.get(x[1])
      self.put(x[0], np.full(LANES, int(x[1]) != 0) if held is None else held)
      return
    size = int(parts[-1][1:]) // 8
    half = f"u{size // 2}"
    if x[0].startswith("{"):
      value = self.get(x[1], f"u{size}").view(half).reshape(LANES, 2)
      for n, name in enumerate(self.many(x[0])):
        self.put(name, np.ascontiguousarray(value[:, n]))
      return
    if x[1].startswith("{"):
      halves = np.stack([self.get(y, half) for y in self.many(x[1])], axis=1)
      self.put(x[0], halves.view(f"u{size}")[:, 0].copy())
      return
    self.put(x[0], self.get(x[1], f"u{size}"))

  def _cvt(self, opcode, parts, x):
    if parts[1] == "rn":
      high, low = (_narrow(self.get(y, np.float32), parts[2]) for y in x[1:])
      self.put(x[0], high.astype(np.uint32) << 16 | low)
      return
    if parts[1:] in (["f32", "bf16"], ["f32", "f16"]):
      self.put(x[0], _wide(self.get(x[1], np.uint16), parts[2])[0])
      return
    to, of = (np.dtype(f"{p[0].replace('s', 'i').replace('b', 'u')}"
                       f"{int(p[1:]) // 8}") for p in parts[-2:])  # fmt: skip
    self.put(x[0], self.get(x[1], of).astype(to))

  def _prmt(self, opcode, parts, x):
    a, b = (self.get(y, np.uint32).astype(np.uint64) for y in x[1:3])
    both, found = a | b << np.uint64(32), np.zeros(LANES, np.uint64)
    selector = self.get(x[3], np.uint32).astype(np.uint64)
    for n in range(4):
      which = selector >> np.uint64(4 * n) & np.uint64(0xF)
      assert (which < 8).all(), "a selector that repeats signs"  # noqa: PLR2004
      byte = both >> np.uint64(8) * which & np.uint64(0xFF)
      found |= byte << np.uint64(8 * n)
    self.put(x[0], found.astype(np.uint32))

  def _bfe(self, opcode, parts, x):
    bits = int(parts[-1][1:])
    at, count = (self.get(y, np.uint32).astype(np.int64) for y in x[2:])
    assert ((count > 0) & (at + count <= bits)).all(), "a field past the end"
    # Shift up to the end and down again, with the sign if it is signed.
    kind = f"{parts[-1][0].replace('s', 'i')}{bits // 8}"
    up = self.get(x[1], kind) << (bits - at - count).astype(kind)
    self.put(x[0], up >> (bits - count).astype(kind))

  def _mul_wide(self, opcode, parts, x):
    dtype = np.int32 if parts[-1] == "s32" else np.uint32
    wide = np.int64 if parts[-1] == "s32" else np.uint64
    a, b = (self.get(y, dtype).astype(wide) for y in x[1:])
    self.put(x[0], a * b)

  def _mul_hi(self, opcode, parts, x):
    self._mul_wide(opcode, parts, x)
    wide = self.registers[x[0]]
    self.put(x[0], (wide >> np.uint64(32)).astype(np.uint32))

  def _mad_wide(self, opcode, parts, x):
    self._mul_wide(opcode, parts, [x[0], *x[1:3]])
    self.put(x[0], self.get(x[0], np.uint64) + self.get(x[3], np.uint64))

  def _setp(self, opcode, parts, x):
    dtype = {"s32": np.int32, "u32": np.uint32, "b32": np.uint32,
             "f32": np.float32, "s64": np.int64, "u64": np.uint64,
             "b64": np.uint64}[parts[-1]]  # fmt: skip
    a, b = (self.get(y, dtype) for y in x[1:3])
    found = {"eq": np.equal, "ne": np.not_equal, "lt": np.less,
             "neu": np.not_equal,
             "le": np.less_equal, "gt": np.greater,
             "ge": np.greater_equal}[parts[1]](a, b)  # fmt: skip
    if len(parts) > 3 and parts[2] in ("and", "or"):  # noqa: PLR2004
      other = self.registers[x[3].lstrip("!")] ^ x[3].startswith("!")
      found = found & other if parts[2] == "and" else found | other
    self.put(x[0], found)

  def _selp(self, opcode, parts, x):
    dtype = f"u{int(parts[-1][1:]) // 8}"
    a, b = (self.get(y, dtype) for y in x[1:3])
    self.put(x[0], np.where(self.registers[x[3]], a, b))

  def _and_pred(self, opcode, parts, x):
    self.put(x[0], self.registers[x[1]] & self.registers[x[2]])

  def _or_pred(self, opcode, parts, x):
    self.put(x[0], self.registers[x[1]] | self.registers[x[2]])

  def _not_pred(self, opcode, parts, x):
    self.put(x[0], ~self.registers[x[1]])

  def _shfl(self, opcode, parts, x):
    value, by = self.get(x[1], np.uint32), int(x[2])
    lane = _LANE ^ by if parts[2] == "bfly" else np.full(LANES, by)
    self.put(x[0].split("|")[0], value[lane])

  def _ld(self, opcode, parts, x):
    count = int(parts[-2][1:]) if parts[-2][0] == "v" else 1
    size = int(parts[-1][1:]) // 8
    address = self.address(x[1])
    if "shared" in parts:
      data, index = self.block.shared_view(address, count * size)
    else:
      data, index = self.block.memory.view(address, opcode, count * size)
    found = data[index].view(f"u{size}")
    names = self.many(x[0])
    for n, name in enumerate(names):
      self.put(name, np.ascontiguousarray(found[:, n]))

  def _st(self, opcode, parts, x):
    size, names = int(parts[-1][1:]) // 8, self.many(x[1])
    address = self.address(x[0])
    values = np.stack([self.get(y, f"u{size}") for y in names], 1)
    values = np.ascontiguousarray(values).view(np.uint8)
    if "shared" in parts:
      data, index = self.block.shared_view(address, values.shape[1])
    else:
      data, index = self.block.memory.view(address, opcode, values.shape[1])
    data[index] = values

  def _cp_async(self, opcode, parts, x):
    if parts[2] == "commit_group":
      self.groups.append(self.open)
      self.open = []
      return
    if parts[2] == "wait_group":
      while len(self.groups) > int(x[0]):
        for copy in self.groups.pop(0):
          self.block.land(*copy)
      return
    target, source = self.address(x[0]), self.address(x[1])
    copy = opcode, target, source, self.get(x[3], np.uint32), int(x[2])
    if self.block.late:
      self.open.append(copy)
    else:
      self.block.land(*copy)

  def _ldmatrix(self, opcode, parts, x):
    data, index = self.block.shared_view(self.address(x[1]), 16)
    rows = data[index].view(np.uint16).reshape(-1, 8, 8)
    assert not (index[:, 0] % 16).any()
    names = self.many(x[0])
    for matrix, name in zip(rows[: len(names)], names, strict=True):
      m = matrix.T if "trans" in parts else matrix
      low, high = m[_ROW, 2 * _PAIR], m[_ROW, 2 * _PAIR + 1]
      self.put(name, high.astype(np.uint32) << 16 | low)

  def _mma_sync(self, opcode, parts, x):
    if "m16n8k32" in parts:
      self.mma_of_bytes(parts, x)
      return
    assert "m16n8k16" in parts and parts[-2] == parts[-3]
    a, b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    acc = np.zeros((16, 8), np.float32)
    for n, name in enumerate(self.many(x[1])):
      pair = _wide(self.get(name, np.uint32), parts[-2])
      for i in range(2):
        a[_ROW + n % 2 * 8, 2 * _PAIR + i + n // 2 * 8] = pair[i]
    for n, name in enumerate(self.many(x[2])):
      pair = _wide(self.get(name, np.uint32), parts[-2])
      for i in range(2):
        b[2 * _PAIR + i + n * 8, _ROW] = pair[i]
    for n, name in enumerate(self.many(x[3])):
      acc[_ROW + n // 2 * 8, 2 * _PAIR + n % 2] = self.get(name, np.float32)
    with np.errstate(all="ignore"):
      acc = acc + a @ b
    for n, name in enumerate(self.many(x[0])):
      self.put(name, acc[_ROW + n // 2 * 8, 2 * _PAIR + n % 2])

  def mma_of_bytes(self, parts, x):
    """Sums of products of signed bytes, four neighbours in a register."""
    assert parts[-4:] == ["s32", "s8", "s8", "s32"]
    a, b = np.zeros((16, 32), np.int32), np.zeros((32, 8), np.int32)
    acc, column = np.zeros((16, 8), np.int32), 4 * _PAIR[:, None] + np.arange(4)
    row = _ROW[:, None]
    for n, name in enumerate(self.many(x[1])):
      four = self.get(name, np.uint32).view(np.int8).reshape(LANES, 4)
      a[row + n % 2 * 8, column + n // 2 * 16] = four
    for n, name in enumerate(self.many(x[2])):
      four = self.get(name, np.uint32).view(np.int8).reshape(LANES, 4)
      b[column + n * 16, row] = four
    for n, name in enumerate(self.many(x[3])):
      acc[_ROW + n // 2 * 8, 2 * _PAIR + n % 2] = self.get(name, np.int32)
    acc = acc + a @ b
    for n, name in enumerate(self.many(x[0])):
      self.put(name, acc[_ROW + n // 2 * 8, 2 * _PAIR + n % 2])


def _wide(bits, kind):
  """Two float32 of a register of two 16-bit numbers, the low one first."""
  bits = bits.astype(np.uint32)
  halves = (bits & 0xFFFF).astype(np.uint16), (bits >> 16).astype(np.uint16)
  if kind == "bf16":
    return [(h.astype(np.uint32) << 16).view(np.float32) for h in halves]
  return [h.view(np.float16).astype(np.float32) for h in halves]


def _narrow(value, kind):
  """Bits of 16-bit numbers, rounded to nearest even."""
  if kind.startswith("f16"):
    return value.astype(np.float16).view(np.uint16)
  bits = value.view(np.uint32)
  rounded = bits + 0x7FFF + (bits >> 16 & 1)
  return np.where(np.isnan(value), 0x7FFF, rounded >> 16).astype(np.uint16)


_ARITHMETIC = {
  "add": lambda a, b: a + b,
  "sub": lambda a, b: a - b,
  "mul": lambda a, b: a * b,
  "div": lambda a, b: a / b,
  "rem": lambda a, b: a % b,
  "mad": lambda a, b, c: a * b + c,
  "fma": lambda a, b, c: a.astype(np.float64) * b + c,
  "neg": lambda a: -a,
  "max": np.maximum,
  "min": np.minimum,
  "and": lambda a, b: a & b,
  "or": lambda a, b: a | b,
  "xor": lambda a, b: a ^ b,
  "not": lambda a: ~a,
  "shl": lambda a, b: a << b,
  "shr": lambda a, b: a >> b,
  "ex2": np.exp2,
  "lg2": np.log2,
  "rsqrt": lambda a: 1 / np.sqrt(a),
  "rcp": lambda a: 1 / a,
}
