"""Runs the PTX of a kernel's block of 128 threads in NumPy, warp by warp.

This checks a GPU kernel without a GPU: not its source or Mosaic's lowering, but
the instructions that the assembler gets, with addresses, swizzles, fragments
and waits. It implements the instructions that kernels of `mma` use, and raises
for others.

A warp runs alone until it reaches a barrier, in random order, so that data from
another warp without a barrier is not there yet. A `cp.async` copy takes place
when it is waited for (`late`) or at once, the extremes of a GPU's behaviour. An
access outside of every buffer raises.
"""

import re

import numpy as np

from tests.kernels_pallas.ptx_warp import SPACE, Warp

WARPS = 4
SHARED = 1024  # where shared memory begins, in its own space

_LABEL = re.compile(r"^(\$L\w+):$")
_GUARD = re.compile(r"^@(!?)(%p\d+)\s+(.*)$")


def instructions(text):
  """Yields (opcode, operands, guard, sense) or a label of a kernel's body."""
  body = text[text.index("\n{") + 2 : text.rindex("}")]
  code, labels = [], {}
  for raw in body.splitlines():
    line = raw.split("//")[0].strip()
    if label := _LABEL.match(line):
      labels[label[1]] = len(code)
    if not line or line.startswith((".", "$")):
      continue
    for one in filter(None, (x.strip() for x in line.split(";"))):
      guard, sense = None, True
      if found := _GUARD.match(one):
        sense, guard, one = not found[1], found[2], found[3]
      opcode, _, rest = one.partition(" ")
      operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
      code.append((opcode.strip(), operands, guard, sense))
  return code, labels


class Memory:
  """Buffers, bound to the kernel's parameters by their first use.

  The compiler orders parameters arbitrarily. `bind` returns the buffer of a
  parameter that is used for the first time, given the instruction's name.
  `copied` counts the bytes that copies read.
  """

  def __init__(self, bind):
    self.bind, self.bound, self.copied = bind, {}, 0

  def view(self, address, opcode, size):
    """Bytes [n, size] at addresses of global memory."""
    which = set((address // SPACE).tolist())
    assert len(which) == 1, f"{opcode}: addresses of several buffers"
    (which,) = which
    if which not in self.bound:
      self.bound[which] = self.bind(opcode)
    data, at = self.bound[which], (address % SPACE).astype(np.int64)
    index = at[:, None] + np.arange(size)
    assert index.min() >= 0 and index.max() < data.size, (
      f"{opcode}: {index.max()} is outside of {data.size} bytes"
    )
    return data, index


class Block:
  """One block of threads.

  Attributes:
    code, labels: As returned by `instructions`.
    memory: Global memory.
    late: Whether copies take place when they are waited for.
  """

  def __init__(self, program, memory, index, shared, late):
    (self.code, self.labels), self.memory = program, memory
    self.index, self.late = index, late
    self.symbols = {"__dynamic_shmem__0": SHARED}
    # NaN in every format, until something is written.
    self.shared = np.full(shared, 0xFF, np.uint8)

  def special(self, name):
    return {"%ctaid.x": self.index[0], "%ctaid.y": self.index[1],
            "%ctaid.z": self.index[2], "%tid.x": 0}[name]  # fmt: skip

  def shared_view(self, address, size):
    index = (address.astype(np.int64) - SHARED)[:, None] + np.arange(size)
    assert index.min() >= 0 and index.max() < self.shared.size, (
      f"{index.max()} is outside of {self.shared.size} bytes shared"
    )
    return self.shared, index

  def land(self, opcode, target, source, size, most):
    """Performs a copy, with zeros for bytes that are not read."""
    _, to = self.shared_view(target, most)
    assert not (target % most).any() and set(size.tolist()) <= {0, most}
    self.shared[to[size == 0]] = 0
    read = size > 0
    if read.any():
      data, index = self.memory.view(source[read], opcode, most)
      assert not (source[read] % most).any()
      self.shared[to[read]] = data[index]
      self.memory.copied += index.size

  def run(self, rng):
    """Runs all warps, each on its own between barriers."""
    warps = [Warp(self, n).run() for n in range(WARPS)]
    while warps:
      alive = []
      for n in rng.permutation(len(warps)):
        if next(warps[n], "done") is None:
          alive.append(n)
      assert len(alive) in (0, len(warps)), "a barrier that some never meet"
      if not alive:
        return
