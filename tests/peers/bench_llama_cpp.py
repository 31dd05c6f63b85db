"""llama.cpp's greedy decoding of the same 4-bit file, if it is installed.

  .venv-peers/bin/python tests/peers/bench_llama_cpp.py

Needs llama-cpp-python, which builds C++; the rest of the table does not.
"""

import statistics
import time

import llama_cpp
import smollm2
from bench_torch import NEW, PROMPT


def main() -> None:
  model = llama_cpp.Llama(
    str(smollm2.path()), n_threads=2, n_ctx=256, verbose=False
  )
  prompt = model.tokenize(smollm2.text()[:4000].encode())[:PROMPT]
  rates = []
  for _ in range(4):
    model.reset()
    begin = time.perf_counter()
    made = 0
    for _ in model.generate(prompt, top_k=1):
      made += 1
      if made == NEW:
        break
    rates.append(made / (time.perf_counter() - begin))
  rate = statistics.median(rates[1:])
  print(f"{rate:.0f} tokens/s at batch 1, prompt {PROMPT} + {NEW}, Q4_1")


if __name__ == "__main__":
  main()
