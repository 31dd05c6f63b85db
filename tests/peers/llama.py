"""llama.cpp itself, through llama-cpp-python's bindings: paths in, arrays out.

Attention's keys and values stay in fp32 here, and nothing is flash attention,
so that of a file of fp32 numbers every product is fp32's.
"""

import ctypes
import os
from collections.abc import Mapping

import numpy as np
from missing import missing

try:
  import llama_cpp
  from llama_cpp import llama_cpp as c
except ImportError:
  missing("llama.cpp", "llama-cpp")

VERSION = llama_cpp.__version__


def opened(path: str | os.PathLike, length: int = 128, **more):
  """Returns the model of a file, ready for texts of up to `length` tokens.

  Args:
    path: of a GGUF file.
    length: tokens, the windows' caches included.
    **more: of `llama_cpp.Llama`, such as `lora_path`.
  """
  return llama_cpp.Llama(
    str(path),
    n_ctx=length,
    n_batch=length,
    n_ubatch=length,
    n_threads=1,
    n_threads_batch=1,
    logits_all=True,
    type_k=c.GGML_TYPE_F32,
    type_v=c.GGML_TYPE_F32,
    swa_full=True,
    verbose=False,
    **more,
  )


def logits(model, rows: np.ndarray) -> np.ndarray:
  """Returns [B, T, V] logits of rows of tokens [B, T], each read alone."""
  out = []
  for row in rows:
    model.reset()
    model.eval(row.tolist())
    out.append(np.array(model.scores[: len(row)]))
  return np.stack(out)


def greedy(model, prompt: np.ndarray, steps: int) -> np.ndarray:
  """Returns [steps] greedy tokens of a prompt [P], through its cache."""
  model.reset()
  model.eval(prompt.tolist())
  out = []
  for _ in range(steps):
    out.append(int(model.scores[model.n_tokens - 1].argmax()))
    model.eval(out[-1:])
  return np.array(out, np.int32)


def quantize(
  source: str | os.PathLike,
  to: str | os.PathLike,
  file_type: int,
  pure: bool = False,
  importances: Mapping[str, np.ndarray] | None = None,
) -> None:
  """Writes a file by `llama_model_quantize`, on one thread.

  Args:
    source: a GGUF file of any type.
    to: a new one.
    file_type: what `general.file_type` will be.
    pure: whether all matrices take the same type, the output's included.
    importances: name of a tensor -> weight of each column's errors.

  Raises:
    ValueError: llama.cpp refuses; why, it says on stderr.
  """
  params = c.llama_model_quantize_default_params()
  params.nthread, params.ftype, params.pure = 1, file_type, pure
  params.allow_requantize = True
  if importances is not None:
    # One more, whose name is null, is the end.
    given = (c.llama_model_imatrix_data * (len(importances) + 1))()
    for i, (name, x) in enumerate(importances.items()):
      given[i].name, given[i].size = name.encode(), x.size
      given[i].data = x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = given
  wrong = c.llama_model_quantize(
    os.fsencode(source), os.fsencode(to), ctypes.byref(params)
  )
  if wrong:
    raise ValueError(f"llama_model_quantize: {wrong}")
