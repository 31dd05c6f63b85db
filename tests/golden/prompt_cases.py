"""Prompts with photographs, and tiny tokenizers for processors to read them.

Both sides build the tokenizers of a `Family` here, from nothing but the
`tokenizers` library: of the kind and with the special tokens that the published
one has. The chat templates are short ones of the published ones' manners.
"""

import dataclasses

from tokenizers import (
  AddedToken,
  Tokenizer,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

MARK = "<image>"
"""An image in `CASES`."""

IMAGENET = {
  "image_mean": [0.485, 0.456, 0.406],
  "image_std": [0.229, 0.224, 0.225],
}
CASES = {  # name -> (text, photographs)
  "one": (f"{MARK}What is here?", ["china"]),
  "row": (f"{MARK}{MARK}{MARK}Which is the widest?\nSay it.",
          ["astronaut", "wide", "coffee"]),
  "between": (f"The first:\n{MARK}\n\nthen {MARK}, and last {MARK} Why?",
              ["tall", "china", "tiny"]),
  "none": ("What is here?", []),
  "newline": (f"{MARK}Say:\n", ["tiny"]),
  "grey": (f"{MARK}What is here?", ["grey"]),
  "begun": (f"{MARK}<bos>What is here?", ["tiny"]),
}  # fmt: skip
CONVERSATIONS = {  # name -> (the user's and the assistant's texts, photographs)
  "asked": ([f"{MARK}{MARK}Is it the same?"], ["coffee", "tall"]),
  "asked_again": ([f"{MARK}What is here?", "A temple.", f"{MARK}And here?"],
                  ["china", "astronaut"]),
  "asked_on": ([f"{MARK}What is here?", "A cat.", "And where?"], ["tiny"]),
  "asked_inside": ([f"First {MARK} then?"], ["tiny"]),
  "asked_without": (["What is here?"], []),
}  # fmt: skip
LEARNED = {  # name -> a conversation of `CONVERSATIONS`, and the answer
  "answered": ("asked", "It is."),
  "answered_again": ("asked_again", "A rocket."),
  "answered_on": ("asked_on", "Here."),
  "answered_inside": ("asked_inside", ""),
}
"""Training rows of the processors that make them (PaliGemma's `suffix`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """How a family's prompts are made.

  Attributes:
    config: its preprocessor_config.json.
    encoder: patch, and patches each way in a soft token, where config.json
      says them.
    mark: what the processor's text has for an image.
    words: kind of the tokenizer: "bytes" (GPT-2's), "letters" (the same without
      words), "llama" or "gemma".
    special: its special tokens.
    bos: the beginning of a text.
    begins: whether its post-processor puts `bos` before a text.
    eos: the end of a text.
    template: of conversations; None if the family has none.
  """

  config: dict
  encoder: tuple[int, int] | tuple[None, None] = (None, None)
  mark: str
  words: str
  special: tuple[str, ...]
  bos: str | None = None
  begins: bool = True
  eos: str
  template: str | None = None


def _config(name, processor, **values):
  return {
    "image_processor_type": f"{name}ImageProcessor",
    "processor_class": f"{processor}Processor",
    **values,
  }


_TURNS = (
  "{{% for m in messages %}}{{{{ '<|im_start|>' + m['role'] + '\n' }}}}"
  "{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}"
  "{{% for part in m['content'] %}}{{% if part['type'] == 'image' %}}"
  "{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
  "{{% endif %}}{{{{ '<|im_end|>\n' }}}}{{% endfor %}}"
  "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}"
  "{{% endif %}}"
)
_GEMMA = (
  "{{{{ bos_token }}}}{{% for m in messages %}}{{{{ '{start}' + "
  "('model' if m['role'] == 'assistant' else m['role']) + '\n' }}}}"
  "{{% if m['content'] is string %}}{{{{ m['content'] | trim }}}}{{% else %}}"
  "{{% for part in m['content'] %}}{{% if part['type'] == 'image' %}}"
  "{image}{{% else %}}{{{{ part['text'] | trim }}}}{{% endif %}}"
  "{{% endfor %}}{{% endif %}}{{{{ '{end}\n' }}}}{{% endfor %}}"
  "{{% if add_generation_prompt %}}{{{{ '{start}model\n' }}}}{{% endif %}}"
)
# Images first, and what a message says only in parts.
_LLAVA = (
  "{% for m in messages %}{{ m['role'] | upper + ': ' }}"
  "{% for part in m['content'] if part['type'] == 'image' %}"
  "{{ '<image>\n' }}{% endfor %}"
  "{% for part in m['content'] if part['type'] == 'text' %}"
  "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_SMOLVLM = (
  "{start}{{% for m in messages %}}{{{{ m['role'] | capitalize }}}}"
  "{{{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}}}"
  "{{% for part in m['content'] %}}{{% if part['type'] == 'image' %}}"
  "<image>{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
  "<end_of_utterance>\n{{% endfor %}}"
  "{{% if add_generation_prompt %}}Assistant:{{% endif %}}"
)

_PALIGEMMA = _GEMMA.format(start="", end="<eos>", image=MARK)

_TILES = tuple(f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6))
_SPLIT = (
  *("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
  *("<global-img>", *_TILES),
)
_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN = (
  *_CHAT,
  *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_OF_GEMMA3 = (
  *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
  *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
_OF_GEMMA4 = (
  *("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|image>", "<image|>"),
  *("<|image|>", "<|video|>", "<|audio>", "<audio|>", "<|audio|>"),
)
_OF_MOLMO2 = (
  *(*_CHAT, "<im_start>", "<im_end>", "<im_patch>", "<im_col>"),
  *("<low_res_im_start>", "<|image|>", "<im_low>", "<frame_start>"),
  *("<frame_end>", "<|video|>"),
)


def _of_gemma3(**more) -> Family:
  config = _config(
    "Gemma3", "Gemma3", size={"height": 896, "width": 896}, **more
  )
  return Family(
    config=config, encoder=(14, 4), mark="<start_of_image>", words="gemma",
    special=_OF_GEMMA3, bos="<bos>", eos="<eos>",
    template=_GEMMA.format(
      start="<start_of_turn>", end="<end_of_turn>", image="<start_of_image>"
    ),
  )  # fmt: skip


def _of_qwen(processor, **more) -> Family:
  mark = "<|vision_start|><|image_pad|><|vision_end|>"
  return Family(
    config=_config("Qwen2VL", processor, **more), mark=mark, words="bytes",
    special=_QWEN, eos="<|im_end|>", template=_TURNS.format(image=mark),
  )  # fmt: skip


FAMILIES = {
  "llava": Family(
    config=_config(
      "CLIP", "Llava", size={"shortest_edge": 336}, crop_size=336
    ),
    encoder=(14, 1), mark=MARK, words="llama",
    special=("<s>", "</s>", "<pad>", MARK), bos="<s>", eos="</s>",
    template=_LLAVA,
  ),
  "llava_next": Family(
    config=_config(
      "LlavaNext", "LlavaNext", size={"shortest_edge": 336}, crop_size=336
    ),
    encoder=(14, 1), mark=MARK, words="llama",
    special=("<s>", "</s>", "<pad>", MARK), bos="<s>", eos="</s>",
    template=_LLAVA,
  ),
  "smolvlm": Family(
    config=_config(
      "SmolVLM", "SmolVLM", size={"longest_edge": 2048},
      max_image_size={"longest_edge": 512},
    ),
    encoder=(16, 4), mark=MARK, words="bytes", special=(*_CHAT, *_SPLIT),
    eos="<end_of_utterance>", template=_SMOLVLM.format(start="<|im_start|>"),
  ),
  "idefics3": Family(
    config=_config("Idefics3", "Idefics3"), encoder=(14, 2), mark=MARK,
    words="bytes",
    special=("<|begin_of_text|>", "<|end_of_text|>", *_SPLIT),
    bos="<|begin_of_text|>", eos="<|end_of_text|>",
    template=_SMOLVLM.format(start="<|begin_of_text|>"),
  ),
  "paligemma": Family(
    config=_config(
      "Siglip", "PaliGemma", size={"height": 224, "width": 224}
    ),
    encoder=(14, 1), mark=MARK, words="gemma",
    special=("<pad>", "<eos>", "<bos>", MARK), bos="<bos>", eos="<eos>",
    template=_PALIGEMMA,
  ),
  "gemma3": _of_gemma3(),
  "gemma3_pan_and_scan": _of_gemma3(
    do_pan_and_scan=True, pan_and_scan_min_crop_size=100,
    pan_and_scan_max_num_crops=4, pan_and_scan_min_ratio_to_activate=1.2,
  ),
  "gemma4": Family(
    config=_config("Gemma4", "Gemma4"), mark="<|image|>", words="gemma",
    special=_OF_GEMMA4, bos="<bos>", eos="<eos>",
    template=_GEMMA.format(start="<|turn>", end="<turn|>", image="<|image|>"),
  ),
  "internvl": Family(
    config=_config(
      "GotOcr2", "InternVL", size={"height": 448, "width": 448}, **IMAGENET
    ),
    encoder=(14, 2), mark="<IMG_CONTEXT>", words="bytes",
    special=(*_CHAT, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    eos="<|im_end|>",
    template=_TURNS.format(image="{{ '<IMG_CONTEXT>\n' }}"),
  ),
  "qwen2_vl": _of_qwen("Qwen2VL"),
  "qwen2_5_vl": _of_qwen("Qwen2_5_VL"),
  "qwen3_vl": _of_qwen("Qwen3VL", patch_size=16,
                       size={"shortest_edge": 65_536,
                             "longest_edge": 16_777_216}),
  "molmo2": Family(
    config=_config("Molmo2", "Molmo2"), mark="<|image|>", words="bytes",
    special=_OF_MOLMO2, eos="<|im_end|>",
    template=_TURNS.format(image="<|image|>"),
  ),
}  # fmt: skip
FAMILIES["paligemma_saved"] = dataclasses.replace(
  FAMILIES["paligemma"],
  begins=False,
  template=_PALIGEMMA.removeprefix("{{ bos_token }}"),
)
"""As `PaliGemmaProcessor.save_pretrained` leaves its tokenizer."""
FAMILIES |= {
  f"{name}_letters": dataclasses.replace(FAMILIES[name], words="letters")
  for name in ("smolvlm", "idefics3")
}
"""Of each processor, under the name of the model type and a variant's."""

_JOINED = {
  "letters": [],
  "bytes": ["ĊĊ", ":Ċ", ".Ċ", "Ġthe", "Ġis", "What", "Ġhere", "Ġlast"],
  "llama": ["▁▁", "▁What", "▁is", "▁the", "▁here", "SER", "▁Why"],
  "gemma": ["\n\n", ":\n", "▁the", "▁is", "▁here", "user", "▁crops"],
}
"""Tokens of more than a letter; the first of each is made of two equal ones.

Those of llama and gemma, of one more and of two firsts are tokens, too: long
runs of newlines are a token of Gemma's, and runs of blanks of Llama's.
"""
_LETTERS = "".join(map(chr, range(33, 127)))


def backend(family: Family) -> Tokenizer:
  """Returns the family's tokenizer: letters, some words, special tokens."""
  byte_level = family.words in ("bytes", "letters")
  letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else [
    *("<unk>", *(f"<0x{i:02X}>" for i in range(256))), *_LETTERS, "▁", "\n"
  ]  # fmt: skip
  tokens, merges = list(letters), []

  def join(first, second):
    if (first, second) not in merges:
      merges.append((first, second))
    if first + second not in tokens:
      tokens.append(first + second)

  for word in _JOINED[family.words]:
    for i in range(1, len(word)):
      join(word[:i], word[i])
  if not byte_level:
    twice = _JOINED[family.words][0]
    join(twice, twice)
    join(twice, twice[0])
  model = models.BPE(
    {token: i for i, token in enumerate(tokens)}, merges,
    unk_token=None if byte_level else "<unk>", byte_fallback=not byte_level,
  )  # fmt: skip
  made = Tokenizer(model)
  if byte_level:
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  else:
    steps = [normalizers.Prepend("▁")] if family.words == "llama" else []
    made.normalizer = normalizers.Sequence(
      [*steps, normalizers.Replace(" ", "▁")]
    )
  made.add_special_tokens(
    [AddedToken(x, normalized=False, special=True) for x in family.special]
  )
  if family.bos is not None and family.begins:
    made.post_processor = processors.TemplateProcessing(
      single=f"{family.bos} $A",
      pair=f"{family.bos} $A $B",
      special_tokens=[(family.bos, made.token_to_id(family.bos))],
    )
  return made


def messages(said: list[str]) -> list[dict]:
  """Returns a conversation that a user begins, of texts."""
  roles = ("user", "assistant")
  return [
    {"role": roles[i % 2], "content": text} for i, text in enumerate(said)
  ]
