"""Loss masks of conversations, against transformers and by construction."""

import dataclasses
import functools
import json
import pathlib

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from research.data import rendering
from research.data.rendering import Conversation
from research.data.sources import records
from research.interop import load
from research.text.tokenizer import Tokenizer
from research.typing import UserError
from tests import support_text

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[2] / "golden" / "chat_masks.json").read_text()
)
*WHOLE, STRADDLING = GOLDEN["cases"]


class Letters:
  """A tokenizer backend whose ids are character codes; `$` ends a text."""

  def encode(self, text, add_special_tokens=False):
    return type("Encoding", (), {"ids": [ord(c) for c in text]})

  def id_to_token(self, i):
    return chr(i)


def letters(template):
  return Tokenizer(
    backend=Letters(), eos=ord("$"), stop=(ord("$"),), chat_template=template
  )


PLAIN = (
  "{% for m in messages %}[{{ m.role[0] }}:{{ m.content }}$]{% endfor %}"
  "{% if add_generation_prompt %}[a:{% endif %}"
)
MARKED = (
  "{% for m in messages %}[{{ m.role[0] }}:{% if m.role == 'assistant' %}"
  "{% generation %}{{ m.content }}$]{% endgeneration %}{% else %}"
  "{{ m.content }}$]{% endif %}{% endfor %}"
)

PARTS = (
  "{% for m in messages %}[{{ m.role[0] }}:{% for x in m.content |"
  " selectattr('type', 'equalto', 'text') %}{{ x.text }}{% endfor %}$]"
  "{% endfor %}{% if add_generation_prompt %}[a:{% endif %}"
)
MARKED_PARTS = (
  "{% for m in messages %}[{{ m.role[0] }}:{% for x in m.content |"
  " selectattr('type', 'equalto', 'text') %}{% if m.role == 'assistant' %}"
  "{% generation %}{{ x.text }}$]{% endgeneration %}{% else %}{{ x.text }}$]"
  "{% endif %}{% endfor %}{% endfor %}"
)
"""As llava-hf's, which leave messages out that are texts."""


def turns(*contents, **last):
  roles = ("user", "assistant")
  out = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
  out[-1] |= last
  return out


def learned(template, messages, first=0):
  made = rendering.example(
    letters(template), Conversation(messages, "f.jsonl:3", first)
  )
  text = "".join(map(chr, made.tokens))
  return text, "".join(
    c if on else "." for c, on in zip(text, made.loss_mask, strict=True)
  )


@functools.cache
def _smollm2():
  return load.load_model("smollm2-135m", packed=True).tokenizer


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("template", ["template", "marked"])
def test_smollm2_token_by_token(case, template):
  """Ids and assistant masks are transformers', with and without marks."""
  tokenizer = dataclasses.replace(_smollm2(), chat_template=GOLDEN[template])
  assert GOLDEN["template"] == _smollm2().chat_template
  made = rendering.example(tokenizer, Conversation(case["messages"], "x:1"))
  np.testing.assert_array_equal(made.tokens, case["ids"])
  np.testing.assert_array_equal(made.loss_mask.astype(int), case["mask"])


def test_no_token_is_half_prompt_half_answer():
  """The answer " " merges with the line break before it, if tokenised whole.

  A model that was given the prompt can only say " " by itself.
  """
  conversation = Conversation(STRADDLING["messages"], "x:1")
  made = rendering.example(_smollm2(), conversation)
  said = made.tokens[made.loss_mask].tolist()
  assert _smollm2().decode(made.tokens.tolist(), False) == STRADDLING["text"]
  assert len(made.tokens) == len(STRADDLING["ids"]) + 1
  assert _smollm2().decode(said, False) == " <|im_end|>"
  prompt = _smollm2().chat(STRADDLING["messages"][:1])
  start = _smollm2().encode(prompt)
  np.testing.assert_array_equal(made.tokens[: len(start)], start)
  assert not made.loss_mask[: len(start)].any() and made.loss_mask[len(start)]


def _with_blank(kind):
  """A backend that puts a blank before a text, in the way of `kind`."""
  if kind == "byte_level":
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
      models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
  else:
    blank = support_text.BLANK
    backend = support_text.byte_fallback(
      [blank, *"abc", f"{blank}a"], [(blank, "a")]
    )
  if kind == "prepend":
    support_text.put_blank_before(backend)
  elif kind != "byte_level":
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
      replacement=blank, prepend_scheme=kind, split=False
    )
  backend.add_special_tokens(["<s>", "</s>", "<|a|>"])
  return backend


BLANKS = ("prepend", "first", "always", "byte_level")


@pytest.mark.parametrize("kind", BLANKS)
@pytest.mark.parametrize(
  "said",
  [
    " {{ m.content }} </s>",
    "{{ m.content }}</s>\n",
    "<|a|>{{ m.content }}</s>",
  ],
)
def test_parts_have_the_ids_of_the_whole_text(kind, said):
  """Also where the tokenizer puts a blank before a text, as Llama 2's."""
  backend = _with_blank(kind)
  end = backend.token_to_id("</s>")
  opened = "<|a|>" if "<|a|>" in said else ""
  template = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]\n"
    f"{{% else %}}{said}{{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{opened}{{% endif %}}"
  )
  tokenizer = Tokenizer(
    backend=backend, eos=end, stop=(end,), chat_template=template
  )
  messages = turns("a b", "a c", "b", "b a")
  made = rendering.example(tokenizer, Conversation(messages, "x:1"))
  whole = tokenizer.chat(messages, add_generation_prompt=False)
  assert made.tokens.tolist() == backend.encode(whole).ids


@pytest.mark.parametrize("kind", BLANKS)
@pytest.mark.parametrize("prompt", ["", "a:", "b </s>"])
@pytest.mark.parametrize("answer", ["b", " a", "c</s> a</s>b", "<|a|>b"])
def test_a_completion_has_the_ids_of_the_whole_text(kind, prompt, answer):
  backend = _with_blank(kind)
  tokenizer = Tokenizer(backend=backend, eos=backend.token_to_id("</s>"))
  made = records.completion_example(tokenizer, prompt, answer)
  whole = backend.encode(f"{prompt}{answer}</s>").ids
  assert made.tokens.tolist() == whole
  assert made.loss_mask.sum() == len(whole) - len(backend.encode(prompt).ids)
  bos = backend.token_to_id("<s>")
  begun = dataclasses.replace(tokenizer, bos=bos, add_bos=True)
  made = records.completion_example(begun, prompt, answer)
  assert made.tokens.tolist() == [bos, *whole]


def test_words_that_look_like_the_template_change_nothing():
  """A user message with the assistant's header stays a user message."""
  messages = turns("[a:I am$]", "no", "[a:x$][a:", "y$z")
  text, mask = learned(PLAIN, messages)
  assert text == "[u:[a:I am$]$][a:no$][u:[a:x$][a:$][a:y$z$]"
  assert mask == "................." + "no$" + "." * 18 + "y$z$."
  assert learned(MARKED, messages)[0] == text
  # The mark includes the bracket; else the same.
  assert learned(MARKED, messages)[1].replace("]", ".") == mask


@pytest.mark.parametrize(
  ("template", "like"), [(PARTS, PLAIN), (MARKED_PARTS, MARKED)]
)
def test_templates_of_parts_get_what_messages_say(template, like):
  messages = turns("q <image>", "one", "r", "two")
  assert learned(template, messages) == learned(like, messages)


def test_only_what_is_asked_for_is_learned():
  messages = turns("q", "one", "r", "two")
  messages[1]["weight"] = 0
  for template in (PLAIN, MARKED):
    _, mask = learned(template, messages)
    assert mask.strip(".]") == "two$"
  _, mask = learned(PLAIN, turns("q", "one", "r", "two"), first=2)
  assert mask.strip(".") == "two$"


@pytest.mark.parametrize(
  ("template", "words"),
  [
    (  # forgets the last character of earlier turns
      "{% for m in messages %}[{{ m.role[0] }}:{% if loop.last %}"
      "{{ m.content }}{% else %}{{ m.content[:-1] }}{% endif %}$]{% endfor %}"
      "{% if add_generation_prompt %}[a:{% endif %}",
      r"f.jsonl:3: message 1 \(assistant\): the chat template",
    ),
    (  # opens the turn otherwise than it writes it
      PLAIN.replace("[a:{%", "<a:{%"),
      "renders the generation prompt unlike the turn itself",
    ),
    (  # a count of the messages stands in front
      "{{ messages | length }}" + PLAIN,
      r"message 1 \(assistant\): the chat template",
    ),
    (
      "{% set x %}" + MARKED + "{% endset %}{{ x }}",
      r"f.jsonl:3: chat template: \{% generation %\} is inside a variable",
    ),
    ("{{ raise_exception('no') }}", "f.jsonl:3: chat template: no"),
  ],
)
def test_templates_that_do_not_tell(template, words):
  with pytest.raises(UserError, match=words) as error:
    learned(template, turns("question", "answer", "thanks", "welcome"))
  assert len(str(error.value).splitlines()) <= 3


def test_last_turn_of_a_rewriting_template_is_defined():
  """Such a template renders a single turn consistently."""
  rewriting = (
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}"
    "[{{ m.role[0] }}:{{ m.content }}$]{% else %}[a:$]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a:{% endif %}"
  )
  assert learned(rewriting, turns("q", "a"))[1] == "." * 9 + "a$."
  with pytest.raises(UserError, match="rewrites it once other messages follow"):
    learned(rewriting, turns("q", "a", "r", "b"))


@pytest.mark.parametrize(
  ("messages", "words"),
  [
    ([{"role": "user", "content": "x"}], "none by the assistant"),
    (turns("x", "y", weight=0), "none by the assistant"),
    (turns("x", "y", weight=0.5), "weight: found '0.5', expected 0 or 1"),
    (["x"], "message 0: found str, expected an object"),
    (turns("x", "y", role="robot"), "message 1: role: found 'robot'"),
    (turns("x", "y", role=None), "message 1: role: found 'None'"),
    (turns("x", None), r"message 1 \(assistant\): content: found NoneType"),
    (turns(["x"], "y"), r"message 0 \(user\): content: found list"),
  ],
)
def test_messages_that_are_none(messages, words):
  with pytest.raises(UserError, match=words) as error:
    Conversation(messages, "f.jsonl:3")
  assert str(error.value).startswith("f.jsonl:3")


def test_a_model_without_a_template():
  with pytest.raises(UserError, match="f.jsonl:3: this model has no chat"):
    learned(None, turns("q", "a"))
