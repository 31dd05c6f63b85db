"""Chat templates: SmolLM2's against transformers, and hostile ones."""

import time

import pytest
from jinja2 import sandbox

from research.text import chat
from research.typing import UserError

SMOLLM2 = (
  "{% for message in messages %}{% if loop.first and "
  "messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
  "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
  "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
  "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def test_smollm2_says_what_its_authors_meant():
  assert chat.render(SMOLLM2, HELLO) == (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained "
    "by Hugging Face<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  turns = [{"role": "system", "content": "Be brief."}, *HELLO]
  assert chat.render(SMOLLM2, turns, add_generation_prompt=False) == (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHello<|im_end|>\n"
  )


@pytest.mark.parametrize(
  "content, expected",
  [
    ("m.content", False),
    ("m.content if m.content is string else m.content[0].text", False),
    ("m.content | map(attribute='text') | join", True),
    ("m.content[0]['text'].strip()", True),  # a text has no such part
    ("'fixed'", False),
    ("raise_exception('no')", False),
  ],
)
def test_templates_of_parts_are_known(content, expected):
  template = "{% for m in messages %}[{{ " + content + " }}]{% endfor %}"
  assert chat.leaves_out_texts(template, {}) == expected
  turns = chat.in_parts(HELLO) if expected else HELLO
  text = chat.render(template, turns) if "raise" not in content else ""
  assert (text == "[Hello]") == (content[0] == "m")


@pytest.mark.parametrize(
  "part, expected",
  [
    ("'<pad>\n' if p.type == 'image' else p.text", "<pad>"),
    ("(loop.index ~ '<pad>') if p.type == 'image' else p.text", "1<pad>"),
    ("'' if p.type == 'image' else p.text", None),
    ("p.text", None),
    ("raise_exception('no')", None),
  ],
)
def test_marks_of_images_are_known(part, expected):
  parts = "{% for p in m.content %}{{ " + part + " }}{% endfor %}"
  template = "{% for m in messages %}[" + parts + "]{% endfor %}"
  assert chat.image_mark(template, {}) == expected


@pytest.mark.parametrize(
  "template, text",
  [
    ("{% for m in messages %}\n  {{ m.content }}\n{% endfor %}\n", "  Hello\n"),
    ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello"}]'),
    ("{{ '<é>' | tojson }}", '"<é>"'),
    ("{% generation %}{{ bos_token }}{% endgeneration %}", "<s>"),
    (
      "{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}"
      "{% endfor %}",
      "1",
    ),
    (
      "{% set ns = namespace(n=0) %}{% for i in range(3) %}"
      "{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
      "3",
    ),
    ("{{ strftime_now('%%') }}", "%"),
    ("{{ 'a' ~ 1 ~ [2] }}{{ ['x', 3] | join('-') }}", "a1[2]x-3"),
    ("{{ ' a,b '.strip().split(',')[1].replace('b', 'c') }}", "c"),
    ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('y') }}", "<y>"),
    ("{{ missing }}{% if tools %}no{% endif %}{{ 7 % 4 * 2 }}", "6"),
  ],
)
def test_what_templates_use(template, text):
  assert chat.render(template, HELLO, names={"bos_token": "<s>"}) == text


@pytest.mark.parametrize(
  "template, words",
  [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("a\n{% for %}", "line 2"),
    ("{{ nothing.at.all }}", "undefined"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ 'x' | nonesuch }}", "nonesuch"),
    ("x" * (chat.MAX_TEMPLATE + 1), "expected at most"),
  ],
)
def test_failing_templates_are_explained(template, words):
  with pytest.raises(UserError, match=words) as error:
    chat.render(template, HELLO)
  assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
  "template",
  [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__init__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['sys'] }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ lipsum.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
  ],
)
def test_nothing_escapes(template):
  try:
    text = chat.render(template, HELLO)
  except UserError:
    return
  assert text == ""  # an undefined name, which prints as nothing


_GROW = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"


@pytest.mark.parametrize(
  "template",
  [
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}"
    "{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'x' * 10000000000 }}",
    "{{ [0] * 10000000000 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ range(10 ** 9) | list }}",
    "{{ 'x' | indent(1000000000) }}",
    "{{ ('x' * 100000).replace('x', 'x' * 100000) }}",
    "{{ ('x' * 4000000).join(range(9999)) }}",
    "{{ range(9999) | join('x' * 4000000) }}",
    _GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    _GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    _GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    _GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    _GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | upper }}",
    _GROW + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    "{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
  ],
)
@pytest.mark.sample(3)
def test_nothing_runs_away(template):
  start = time.monotonic()
  with pytest.raises(UserError):
    chat.render(template, HELLO)
  assert time.monotonic() - start < 10


@pytest.mark.parametrize(
  "template",
  [
    "{{ 'x'.ljust(9000000) }}",
    "{{ 'x' * 9000000 }}",
    "{{ 'x' | center(9000000) }}",
    "{% for a in range(3000) %}{% for b in range(3000) %}x{% endfor %}"
    "{% endfor %}",
  ],
)
def test_jinja_s_own_sandbox_lets_it_run(template):
  """What bounds are for: only `range` has one there, of 100,000."""
  plain = sandbox.ImmutableSandboxedEnvironment().from_string(template)
  assert len(plain.render()) == 9_000_000
  with pytest.raises(UserError):
    chat.render(template, HELLO)


def test_templates_are_found(tmp_path):
  assert chat.find(tmp_path, {}) is None
  assert chat.find(tmp_path, {"chat_template": "a"}) == "a"
  named = [
    {"name": "tool_use", "template": "b"},
    {"name": "default", "template": "c"},
  ]
  assert chat.find(tmp_path, {"chat_template": named}) == "c"
  with pytest.raises(UserError, match="chat_template"):
    chat.find(tmp_path, {"chat_template": [1]})
  (tmp_path / "chat_template.json").write_text('{"chat_template": "d"}')
  assert chat.find(tmp_path, {"chat_template": "a"}) == "d"
  (tmp_path / "chat_template.jinja").write_text("e")
  assert chat.find(tmp_path, {"chat_template": "a"}) == "e"
