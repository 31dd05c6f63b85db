"""Flags of `experiments.generate` that are for diffusion models alone."""

from absl import flags

NAMES = (
  *("canvas", "block", "steps", "policy", "select", "plan", "remask"),
  *("cache", "guidance", "ends", "edit", "gif", "html"),
)
"""What `filling_wanted.Wanted` calls them, too."""


def define(values: flags.FlagValues) -> None:
  """Defines them."""
  flags.DEFINE_string(
    "canvas",
    "fixed",
    "For diffusion: places for the answer, fixed (--max_new_tokens), or auto: "
    "64 at first (auto:N: N), and more, up to --max_new_tokens, while the "
    "model does not expect to end there (DAEDAL; with --policy=threshold:0.9).",
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
    "policy",
    "quota",
    "For diffusion, what a call fills: quota (as many as the steps ask for), "
    "threshold:P (all at least so likely), quota+threshold:P (whichever is "
    "more, LLaDA 2's), factor:F (Fast-dLLM's), credit:P (a threshold, earlier "
    "calls counted in) or hierarchy (dInfer's).",
    flag_values=values,
  )
  flags.DEFINE_enum(
    "select",
    "candidate",
    ["candidate", "max", "margin", "entropy", "random"],
    "For diffusion: what makes a place sure, its candidate's probability, the "
    "largest one, the margin between the two largest, a low entropy, or "
    "chance.",
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
  flags.DEFINE_string(
    "remask",
    "none",
    "For diffusion, with --plan=chance: filled places are masked again with "
    "probability E (cap:E), E times the most there can be (rescale:E), or more "
    "where the model was less sure (confidence:E). ReMDM; give it more --steps "
    "than tokens.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "cache",
    "none",
    "For diffusion: keys and values kept within a block, none, prefix, dual, "
    "vicinity:N (all but the block and N tokens around it), or delayed (all "
    "but masks and what was just filled; delayed:N reads all every N calls).",
    flag_values=values,
  )
  flags.DEFINE_float(
    "guidance",
    0.0,
    "For diffusion: how much more than the model the prompt counts.",
    lower_bound=0.0,
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
  flags.DEFINE_float(
    "edit",
    None,
    "For diffusion: filled places change where another token is more likely "
    "than this (LLaDA 2.1), as long as some do.",
    lower_bound=0.0,
    upper_bound=1.0,
    flag_values=values,
  )
  flags.DEFINE_string(
    "gif", None, "For diffusion: a moving picture to write.", flag_values=values
  )
  flags.DEFINE_string(
    "html", None, "For diffusion: a page to write.", flag_values=values
  )
