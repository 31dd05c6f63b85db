"""Flags of `experiments.generate` that are for diffusion models alone."""

from absl import flags

NAMES = (
  *("infill", "canvas", "block", "steps", "policy", "select", "plan"),
  *("place_temperature", "tempered", "remask", "cache", "guidance", "ends"),
  *("stop_early", "edit", "edit_steps", "gif", "html"),
)
"""What `filling_wanted.Wanted` calls them, too."""


def define(values: flags.FlagValues) -> None:
  """Defines them."""
  _define_places(values)
  _define_policy(values)
  _define_changes(values)
  _define_reading(values)


def _define_places(values: flags.FlagValues) -> None:
  """Defines what is filled."""
  flags.DEFINE_multi_string(
    "infill",
    [],
    "For diffusion, instead of an answer: a text with gaps, [[N]] for one of N "
    'tokens, e.g. --infill="def f(x): [[8]] return y". Behind the --prompt, if '
    "there is one (with --chat, as the beginning of the answer). Brackets that "
    "are text: \\[[. May be given several times.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "canvas",
    "fixed",
    "For diffusion: places for the answer, fixed (--max_new_tokens), or auto: "
    "64 at first (auto:N: N), and more, up to --max_new_tokens, while the "
    "model does not expect to end there (DAEDAL; with --policy=threshold:0.9). "
    "auto,by=8,window=32,begin=0.5,ready=0.9,low=0.1,ends=16, or some of these "
    "(the defaults): masks at a time, places asked, how sure they have to be.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "block",
    None,
    "For diffusion: tokens of a block; blocks are filled from left to right. "
    "By default the model's, or 32, or all.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "steps",
    None,
    "For diffusion: calls of the model, of all blocks together; by default one "
    "a token. For --policy=quota.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_string(
    "gif", None, "For diffusion: a moving picture to write.", flag_values=values
  )
  flags.DEFINE_string(
    "html", None, "For diffusion: a page to write.", flag_values=values
  )


def _define_policy(values: flags.FlagValues) -> None:
  """Defines which places a call fills."""
  flags.DEFINE_string(
    "policy",
    "quota",
    "For diffusion, what a call fills: quota (as many as the steps ask for), "
    "threshold:P (all at least so likely), quota+threshold:P (whichever is "
    "more, LLaDA 2's), factor:F (Fast-dLLM's), credit:P (a threshold, earlier "
    "calls counted in; credit:P,alpha=0.7,beta=0.8,gamma=0.2 says how) or "
    "hierarchy (dInfer's; hierarchy:0.92,low=0.62: any place, the surest of a "
    "run).",
    flag_values=values,
  )
  flags.DEFINE_enum(
    "select",
    "candidate",
    ["candidate", "max", "margin", "entropy", "random"],
    "For diffusion: what makes a place sure, its candidate's probability, the "
    "largest one, the margin between the two largest, or, with --policy=quota, "
    "a low entropy or chance.",
    flag_values=values,
  )
  flags.DEFINE_enum(
    "plan",
    "even",
    ["even", "dream", "linear", "cosine", "chance"],
    "For diffusion, with --policy=quota: how many places each call fills; "
    "chance draws it (with --select=random: ancestral sampling).",
    flag_values=values,
  )
  flags.DEFINE_float(
    "place_temperature",
    None,
    "For diffusion, with --policy=quota: places are drawn, by how sure they "
    "are divided by this (Dream's alg_temp); by default the surest are taken.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "tempered",
    False,
    "For diffusion: places are as sure as what is drawn from, with "
    "--temperature, --top_k and so on (LLaDA 2), not as the model is.",
    flag_values=values,
  )
  flags.DEFINE_enum(
    "ends",
    "any",
    ["any", "last", "never"],
    "For diffusion: when ends of text are filled in: as any token, after all "
    "others of a block, or never. The cures for answers that end too early.",
    flag_values=values,
  )


def _define_changes(values: flags.FlagValues) -> None:
  """Defines what becomes of places that are filled."""
  flags.DEFINE_bool(
    "stop_early",
    True,
    "For diffusion: what is behind an end of text is not filled any more.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "remask",
    "none",
    "For diffusion, with --plan=chance: filled places are masked again with "
    "probability E (cap:E), E times the most there can be (rescale:E), or more "
    "where the model was less sure (confidence:E). ReMDM; give it more --steps "
    "than tokens. cap:E,start=0.6,stop=0.1: between these times, from 1 to 0.",
    flag_values=values,
  )
  flags.DEFINE_float(
    "edit",
    None,
    "For diffusion: filled places change where another token is more likely "
    "than this (LLaDA 2.1), as long as some do.",
    lower_bound=0.0,
    upper_bound=1.0,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "edit_steps",
    16,
    "For diffusion, with --edit: at most so many calls more a block.",
    lower_bound=0,
    flag_values=values,
  )


def _define_reading(values: flags.FlagValues) -> None:
  """Defines what a call reads."""
  flags.DEFINE_string(
    "cache",
    "none",
    "For diffusion: keys and values kept within a block, none, prefix (of all "
    "before it), dual (of all around it), vicinity:N (of all but N tokens "
    "around it; vicinity:N,after=M has M behind it), or delayed (of all but "
    "masks and what was just filled; delayed:N reads all every N calls; "
    "delayed,halvings=3 says how often the number of tokens that a call reads "
    "may halve).",
    flag_values=values,
  )
  flags.DEFINE_float(
    "guidance",
    0.0,
    "For diffusion: how much more than the model the prompt counts.",
    lower_bound=0.0,
    flag_values=values,
  )
