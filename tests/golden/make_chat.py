"""Writes chat_masks.json: transformers' tokens and assistant masks.

  .venv-peers/bin/python tests/golden/make_chat.py [--to FILE]

SmolLM2's own template, which has no `{% generation %}`, gives the text and
the ids. The mask is transformers' for the same template with the mark put
around what the assistant says and its `<|im_end|>`.
"""

import argparse
import json
import pathlib
import sys

import transformers

GOLDEN = pathlib.Path(__file__).parent
sys.path[:0] = [str(GOLDEN.parent / "peers")]
import smollm2  # noqa: E402

FILE = GOLDEN / "chat_masks.json"
SAID = "message['content'] + '<|im_end|>'"


def _turns(*contents, system=None):
  roles = ("user", "assistant")
  out = [{"role": "system", "content": system}] if system else []
  return out + [
    {"role": roles[i % 2], "content": c} for i, c in enumerate(contents)
  ]


CONVERSATIONS = [
  _turns("Hello", "Hi! How can I help?"),
  _turns("1+1?", "2", "And 2+2?", "It's 4.\n\nDone.", system="Be brief."),
  _turns(
    "Write <b>user</b>", "user\nassistant\n  indented", "日本語", "はい 🙂"
  ),
  _turns("x", "y", "no answer yet"),
  _turns("say nothing", " "),
]


def marked(template: str) -> str:
  """Returns SmolLM2's template with the assistant's words marked."""
  old = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
  old += "'<|im_end|>' + '\n'}}"
  assert old in template, template
  new = (
    "{% if message['role'] == 'assistant' %}"
    "{{'<|im_start|>' + message['role'] + '\n'}}{% generation %}{{"
    + SAID
    + "}}{% endgeneration %}{{'\n'}}{% else %}"
    + old
    + "{% endif %}"
  )
  return template.replace(old, new)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--to", type=pathlib.Path, default=FILE)
  args = parser.parse_args()
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=smollm2.tokenizer()
  )
  plain = smollm2.field("tokenizer.chat_template")
  cases = []
  for messages in CONVERSATIONS:
    found = fast.apply_chat_template(
      messages,
      chat_template=marked(plain),
      tokenize=True,
      return_dict=True,
      return_assistant_tokens_mask=True,
    )
    text = fast.apply_chat_template(
      messages, chat_template=plain, tokenize=False
    )
    ids = fast.encode(text, add_special_tokens=False)
    assert ids == found["input_ids"]
    cases.append(
      dict(messages=messages, text=text, ids=ids, mask=found["assistant_masks"])
    )
  out = dict(template=plain, marked=marked(plain), cases=cases)
  args.to.write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
  main()
