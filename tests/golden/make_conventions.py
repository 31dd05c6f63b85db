r"""Writes what public reward models read: transformers' ids of their scripts.

  pip download --no-deps --dest WHEELS mistral-common llama-models dashscope
  .venv-peers/bin/python tests/golden/make_conventions.py --wheels WHEELS

The packages have the vocabularies of Mistral, Llama 3 and Qwen. Written are
`NAME/tokenizer.json`, each vocabulary's pieces of the texts below under their
own ids, which encode these texts as all of it does; `tokenizer_config.json`;
and `golden.json`: for each convention its tokenizer, question and steps, the
text that is read, its ids, and the places of scores as the published script
finds them:

* math_shepherd: peiyi9979/math-shepherd-mistral-7b-prm, model card: ids equal
  to the tag's. Its own example, and numbers of several digits.
* rlhflow: RLHFlow/RLHF-Reward-Modeling, math-rm/prm_evaluate.py at fc39179: a
  chat for each step, the third token from its end.
* skywork: SkyworkAI/skywork-o1-prm-inference, model_utils/io_utils.py at
  719b56b: a flag at the newline behind each line.
* qwen_math_prm: Qwen/Qwen2.5-Math-PRM-7B, model card: ids equal to <extra_0>.
* trl: huggingface/trl, PRMTrainer.tokenize_row at f2cd577, and the ids in its
  docstring.

Without --wheels the tokenizers that are there are used.
"""

import argparse
import base64
import json
import pathlib
import zipfile

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

TO = pathlib.Path(__file__).parent / "conventions"
TAG = "\u043a\u0438"
SYSTEM = (
  "Please reason step by step, and put your final answer within \\boxed{}."
)
DUCKS = (
  "Janet\u2019s ducks lay 16 eggs per day. She eats three for breakfast every"
  " morning and bakes muffins for her friends every day with four. She sells"
  " the remainder at the farmers' market daily for $2 per fresh duck egg. How"
  " much in dollars does she make every day at the farmers' market?"
)
STEPS = [
  "Step 1: Janet's ducks lay 16 eggs per day.",
  "Step 2: She eats three for breakfast every morning, so she has 16 - 3 = 13"
  " eggs left.",
  "Step 3: She sells 1234567 - 12 = 1234555.",
  "Step 4: The answer is: 18",
]
LINES = ["To sell:\n   - 16 - 7 = 9 eggs\n   - 9 * 2", "", "So $18."]
TRL = dict(
  question="Which number is larger, 9.8 or 9.11?",
  steps=["11 is greater than 8.", "Hence, 9.11 > 9.8."],
)
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' +"
  " message['content'] + '<|im_end|>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
  "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nCutting"
  " Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n<|eot_id|>' }}"
  "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] +"
  " '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
  "{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""Llama 3.1's and Qwen2.5's for texts, without tools."""

CASES = [
  ("math_shepherd", "mistral", DUCKS, STEPS),
  ("rlhflow", "llama", DUCKS, STEPS),
  ("skywork", "qwen", DUCKS, STEPS),
  ("skywork", "qwen", DUCKS, LINES),
  ("qwen_math_prm", "qwen", DUCKS, STEPS),
  ("trl", "qwen", *TRL.values()),
  ("trl", "llama", *TRL.values()),
  ("trl", "mistral", *TRL.values()),
]


# --- vocabularies ---


def mistral_pieces(wheels):
  """Returns the pieces of Mistral's SentencePiece model, in order of ids."""
  data = _read(
    wheels, "mistral_common-*", "mistral_common/data/tokenizer.model.v1"
  )
  found, at = [], 0
  while at < len(data):
    key, at = _varint(data, at)
    if key & 7 == 2:
      size, at = _varint(data, at)
      if key >> 3 == 1:  # a piece, whose first field is its text
        n, start = _varint(data, at + 1)
        found.append(data[start : start + n].decode())
      at += size
    elif key & 7 == 0:
      _, at = _varint(data, at)
    else:
      at += {1: 8, 5: 4}[key & 7]
  return found


def ranks(wheels, wheel, name):
  """Returns the byte pieces of a file of tiktoken, in order of ids."""
  lines = _read(wheels, wheel, name).splitlines()
  return [base64.b64decode(line.split()[0]) for line in lines if line]


def _read(wheels, wheel, name):
  (path,) = wheels.glob(f"{wheel}.whl")
  return zipfile.ZipFile(path).read(name)


def _varint(data, at):
  value = shift = 0
  while True:
    byte = data[at]
    at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
    if byte < 128:
      return value, at


def part(pieces, texts):
  """Returns (vocabulary, merges) of the pieces that texts contain.

  A merge makes the piece of the lowest id that two neighbours make, so what
  other pieces there are does not matter.
  """
  have = {x: i for i, x in enumerate(pieces) if any(x in t for t in texts)}
  merges = [
    (x[:i], x[i:])
    for x in sorted(have, key=have.get)
    for i in range(1, len(x))
    if x[:i] in have and x[i:] in have
  ]
  return have, merges


def mistral(wheels, texts):
  """Returns Mistral's tokenizer for these texts, as transformers' of Llama."""
  pieces = mistral_pieces(wheels)
  spaced = ["\u2581" + x.replace(" ", "\u2581") for x in texts]
  vocab, merges = part(pieces, spaced)
  vocab |= {x: i for i, x in enumerate(pieces[:259])}  # specials and bytes
  made = tokenizers.Tokenizer(
    models.BPE(
      vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
  )
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  made.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  made.add_special_tokens(["<unk>", "<s>", "</s>"])
  made.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  return made, dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def of_bytes(pieces, texts, pattern, special):
  """Returns a byte-level tokenizer for these texts."""
  vocab, merges = part(pieces, [x.encode() for x in texts])
  vocab |= {x: i for i, x in enumerate(pieces) if len(x) == 1}
  name = {b: c for b, c in _byte_names().items()}

  def spelled(piece):
    return "".join(name[b] for b in piece)

  vocab = {spelled(x): i for x, i in vocab.items()}
  vocab |= special
  merges = [(spelled(x), spelled(y)) for x, y in merges]
  made = tokenizers.Tokenizer(models.BPE(vocab, merges))
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(list(special))
  return made


def _byte_names():
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in plain]
  return dict(zip(plain, map(chr, plain), strict=True)) | {
    b: chr(256 + i) for i, b in enumerate(others)
  }


PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama(wheels, texts):
  """Returns Llama 3's tokenizer for these texts."""
  pieces = ranks(
    wheels, "llama_models-*", "llama_models/llama3/tokenizer.model"
  )
  special = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
  }
  made = of_bytes(pieces, texts, PATTERN % r"\p{N}{1,3}", special)
  bos = "<|begin_of_text|>"
  made.post_processor = processors.TemplateProcessing(
    single=f"{bos} $A", special_tokens=[(bos, 128000)]
  )
  return made, dict(bos_token=bos, eos_token="<|eot_id|>", chat_template=LLAMA)


def qwen(wheels, texts):
  """Returns Qwen's tokenizer for these texts, with Qwen2.5-Math-PRM's tag."""
  pieces = ranks(wheels, "dashscope-*", "dashscope/resources/qwen.tiktoken")
  special = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<extra_0>": 151651,
  }
  made = of_bytes(pieces, texts, PATTERN % r"\p{N}", special)
  return made, dict(eos_token="<|im_end|>", chat_template=CHATML)


# --- what the published scripts read ---


def math_shepherd(tok, question, steps):
  text = f"{question} " + "\n".join(f"{x} {TAG}" for x in steps)
  ids = tok.encode(text)
  tag = tok.encode(TAG)[-1]
  return text, ids, [i for i, x in enumerate(ids) if x == tag]


def rlhflow(tok, question, steps):
  chat, ends = [], []
  for i, step in enumerate(x.strip() for x in steps):
    content = step if i else f"{question} {step}"
    chat.append({"role": "user", "content": content})
    chat.append({"role": "assistant", "content": "+"})
    text = tok.apply_chat_template(chat, tokenize=False)
    ids = tok.encode(text, add_special_tokens=False)
    ends.append(len(ids) - 3)
  return text, ids, ends


def skywork(tok, question, steps):
  bos, text = tok.bos_token or "", "\n".join(steps)
  ids, ends = tok.encode(f"{bos}{question}\n"), []
  newline = tok.encode("\n")[-1]
  for line in text.split("\n"):
    ids += [*(tok.encode(line) if line else []), newline]
    ends.append(len(ids) - 1)
  return f"{bos}{question}\n{text}\n", ids, ends


def qwen_math_prm(tok, question, steps):
  turns = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": question},
    {"role": "assistant", "content": "<extra_0>".join([*steps, ""])},
  ]
  text = tok.apply_chat_template(turns, tokenize=False)
  ids = tok.encode(text)
  tag = tok.encode("<extra_0>")[0]
  return text, ids, [i for i, x in enumerate(ids) if x == tag]


def trl(tok, question, steps):
  def plain(text):
    return tok(text, add_special_tokens=False)["input_ids"]

  ids, ends = plain(question), []
  if tok.bos_token_id is not None:
    ids = [tok.bos_token_id, *ids]
  for step in steps:
    ids += plain(step) + plain("\n")
    ends.append(len(ids) - 1)
  text = question + "".join(f"{x}\n" for x in steps)
  return text, ids, ends


SCRIPTS = dict(
  math_shepherd=math_shepherd,
  rlhflow=rlhflow,
  skywork=skywork,
  qwen_math_prm=qwen_math_prm,
  trl=trl,
)


def write_tokenizers(wheels, to):
  """Writes the tokenizers for all texts, and what tests add to them."""
  texts = [DUCKS, *STEPS, *LINES, TRL["question"], *TRL["steps"], SYSTEM]
  texts += [f" {TAG}", TAG, "+", "-", "\n", "\n\n", " ", f"Step 5: it {TAG} is"]
  texts += ["system\n", "user\n", "assistant\n", "Cutting Knowledge Date:"]
  texts += [
    " December 2023\n",
    "Today Date: 26 Jul 2024\n\n",
    ". ",
    f" {TAG} is",
  ]
  for make in (mistral, llama, qwen):
    made, config = make(wheels, texts)
    folder = to / make.__name__
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"), pretty=False)
    config = json.dumps(config, indent=1) + "\n"
    (folder / "tokenizer_config.json").write_text(config)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--wheels", type=pathlib.Path)
  parser.add_argument("--to", type=pathlib.Path, default=TO)
  args = parser.parse_args()
  if args.wheels:
    write_tokenizers(args.wheels, args.to)
  golden = []
  for name, family, question, steps in CASES:
    folder = args.to / family
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tok = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(folder / "tokenizer.json"), **config
    )
    text, ids, ends = SCRIPTS[name](tok, question, steps)
    golden.append(
      dict(
        convention=name,
        tokenizer=family,
        question=question,
        steps=steps,
        text=text,
        tokens=ids,
        ends=ends,
      )
    )
  path = args.to / "golden.json"
  path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  main()
