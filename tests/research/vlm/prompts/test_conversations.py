"""Conversations with images: their ids and labels, by construction."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from research.data.rendering import Conversation
from research.text.tokenizer import Tokenizer
from research.typing import UserError
from research.vlm.images import prompt_ids
from research.vlm.images.prompts import MARK, PromptFormat, Soft, Token
from research.vlm.prompts import conversations
from research.vlm.prompts.conversations import ChatSample, join_texts

IMAGE = 7  # no character of the texts


class Letters:
  """A tokenizer backend whose ids are character codes; `$` ends a text."""

  def encode(self, text, add_special_tokens=False):
    return type("Encoding", (), {"ids": [ord(c) for c in text]})

  def token_to_id(self, text):
    return None

  def id_to_token(self, i):
    return chr(i)


def letters(template):
  return Tokenizer(
    backend=Letters(), eos=ord("$"), stop=(ord("$"),), chat_template=template
  )


EACH = "{% for m in messages %}[{{ m.role[0] }}:"
END = "{% if add_generation_prompt %}[a:{% endif %}"
SAID = "{{ m.content }}$]"
PARTS = (
  "{% for x in m.content %}{% if x.type == 'image' %}<image>"
  "{% else %}{{ x.text }}{% endif %}{% endfor %}$]"
)


def marked(said):
  """Returns a template that marks what the assistant says."""
  return (
    f"{EACH}{{% if m.role == 'assistant' %}}{{% generation %}}{said}"
    f"{{% endgeneration %}}{{% else %}}{said}{{% endif %}}{{% endfor %}}"
  )


OWN_MARK = (  # InternVL's, which writes more of an image than its mark
  "{% if m.content is string %}{{ m.content }}{% else %}"
  + PARTS.replace("<image>", "<pad>").removesuffix("$]")
  + "{% endif %}$]"
)


TEMPLATES = {
  "texts": f"{EACH}{SAID}{{% endfor %}}{END}",
  "texts, marked": marked(SAID),
  "parts": f"{EACH}{PARTS}{{% endfor %}}{END}",  # as LLaVA's and SmolVLM's
  "parts, marked": marked(PARTS),
  "its own mark": f"{EACH}{OWN_MARK}{{% endfor %}}{END}",
  "its own mark, marked": marked(OWN_MARK),
}
TURNS = [  # texts with images between each two, and the answer
  (["", "\nWhat is it?"], "red"),
  (["[a:I am$][a:", " and <image>?", " [u:"], ""),
  (["No image: <image> assistant"], "[u:<image>$"),
  (["x<pad>", ""], "$ <pad>"),
  (["", "", ""], "a\n b "),
]
PIECES = [  # of each image in turn
  (Soft(2),),
  (Token("<"), Soft(1), Token(">")),
  (Soft(3),),
  (Soft(1), Token("\n"), Soft(1)),
  (Soft(2),),
  (Soft(1),),
]


def sample(turns):
  messages = []
  for texts, answer in turns:
    messages += [
      {"role": "user", "content": join_texts(texts)},
      {"role": "assistant", "content": join_texts([answer])},
    ]
  return ChatSample((), Conversation(messages, "f.jsonl:3"))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("turns", range(1, 6))
def test_only_answers_and_their_ends_are_learned(template, turns):
  """Letter by letter; never a header, a placeholder or what surrounds it."""
  chosen = TURNS[-turns:]
  count = sum(len(texts) - 1 for texts, _ in chosen)
  images = PIECES[:count]
  ids, mask, left = [], [], iter(images)

  def add(text, learned):
    ids.extend(map(ord, text))
    mask.extend([learned] * len(text))

  for texts, answer in chosen:
    add("[u:", False)
    for number, text in enumerate(texts):
      for piece in next(left) if number else ():
        if isinstance(piece, Soft):
          ids.extend([IMAGE] * piece.count)
          mask.extend([False] * piece.count)
        else:
          add(piece.text, False)
      add(text, False)
    add("$][a:", False)
    add(f"{answer}$", True)
    add("]", False)

  made = conversations.tokens_of(
    sample(chosen), images, letters(TEMPLATES[template]), IMAGE
  )
  np.testing.assert_array_equal(made.tokens, ids)
  np.testing.assert_array_equal(made.loss_mask, mask)
  said = "".join(map(chr, made.tokens[made.loss_mask]))
  assert said == "".join(f"{answer}$" for _, answer in chosen)


FORMS = [
  PromptFormat(),
  PromptFormat(begin="always"),
  PromptFormat(begin="after_images"),
  PromptFormat(begin="after_images", end="!?"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("learned", range(3))
def test_rows_hold_the_prompt_that_the_last_answer_is_asked_by(
  learned, form, written, adds
):
  """Letter by letter: `^` begins it once, or follows its last image."""
  turns = [(["a"], "b"), (["", "c", "d"], "e"), (["f", "", "g"], "h")]
  chat = sample(turns)
  messages = [dict(x) for x in chat.conversation.messages]
  for message in messages[2 * learned + 2 :]:
    message["weight"] = 0
  chat = dataclasses.replace(chat, conversation=Conversation(messages, "f:3"))
  template = ("^" if written else "") + TEMPLATES["texts"]
  words = dataclasses.replace(letters(template), bos=ord("^"), add_bos=adds)
  made = conversations.tokens_of(chat, [(Soft(1),)] * 4, words, IMAGE, form)

  soft = chr(IMAGE)
  asked = [f"[u:{soft.join(texts)}$][a:" for texts, _ in turns]
  said = [f"{answer}$" for _, answer in turns]
  pairs = zip(asked, said, strict=True)
  before = [text for pair in pairs for text in (*pair, "]")][: 3 * learned]
  prompt = "".join(["^" if written else "", *before, asked[learned], form.end])
  last = prompt.rfind(soft) + 1
  if form.begin == "after_images" and last:
    prompt = f"{prompt[:last]}^{prompt[last:]}"
  elif not written and (adds or form.begin != "first"):
    prompt = f"^{prompt}"
  text = "".join(map(chr, made.tokens))
  assert text.startswith(prompt + said[learned])
  assert text.endswith("$]")
  answers = "".join(map(chr, made.tokens[made.loss_mask]))
  assert answers == "".join(said[: learned + 1])
  assert made.loss_mask[len(prompt) :][: len(said[learned])].all()
  assert not made.loss_mask[len(prompt + said[learned]) :].any()
  rendered = words.chat(messages[: 2 * learned + 1], image=MARK)
  texts = rendered.split(MARK)
  images = [(Soft(1),)] * (len(texts) - 1)
  ids = prompt_ids.joined_ids(texts, images, words, IMAGE, form)
  assert made.tokens[: len(prompt)].tolist() == ids


@pytest.mark.parametrize("special", [True, False])
def test_a_typed_placeholder_stays_text(special):
  """Also one that the tokenizer has as a token: no feature takes its place."""
  words = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(
    models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[])
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  names = ["<|pad|>", "$"]
  (backend.add_special_tokens if special else backend.add_tokens)(names)
  image, end = map(backend.token_to_id, names)
  tokenizer = Tokenizer(
    backend=backend, stop=(end,), chat_template=TEMPLATES["texts"]
  )
  turns = [(["<|pad|><image>", "<|pad|>"], "<|pad|> <image>")]
  made = conversations.tokens_of(sample(turns), [(Soft(3),)], tokenizer, image)
  here = made.tokens == image
  np.testing.assert_array_equal(made.tokens[here], [image] * 3)
  assert (np.diff(np.flatnonzero(here)) == 1).all()
  text = "[u:<|pad|><image><|pad|>$][a:<|pad|> <image>$]"
  assert tokenizer.decode(made.tokens[~here].tolist(), False) == text


ALL_LEARNED = (
  "{% for m in messages %}{% generation %}{{ m.content }}$]{% endgeneration %}"
  "{% endfor %}"
)


@pytest.mark.parametrize(
  ("template", "found"),
  [
    (TEMPLATES["texts"].replace("m.content", "m.content | length"), 0),
    (f"<image>{TEMPLATES['texts']}", 2),
    (ALL_LEARNED, 1),
  ],
)
def test_templates_that_lose_add_or_learn_images_are_refused(template, found):
  with pytest.raises(UserError, match=f"f.jsonl:3: .* found {found} times"):
    conversations.tokens_of(
      sample([(["a", "b"], "c")]), PIECES[:1], letters(template), IMAGE
    )


def test_a_reserved_character_is_refused():
  with pytest.raises(UserError, match=r"found U\+FDD0 in 'a\\ufdd0'"):
    join_texts(["a\ufdd0"])


def test_one_message_may_be_left_out_of_the_loss():
  given = sample(TURNS[:2])
  messages = [dict(each) for each in given.conversation.messages]
  messages[1]["weight"] = 0
  given = dataclasses.replace(
    given, conversation=Conversation(messages, "f.jsonl:3")
  )
  made = conversations.tokens_of(
    given, PIECES[:3], letters(TEMPLATES["texts"]), IMAGE
  )
  assert "".join(map(chr, made.tokens[made.loss_mask])) == "$"
