"""Reasoning problems whose answers can be verified, one kind a file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "answers": ["AnswerFile", "gsm8k"],
    "arc": ["ARC"],
    "chain": ["Chain"],
    "countdown": ["Countdown"],
    "gsm_symbolic": ["GSMSymbolic"],
    "gym": ["Gym"],
    "task": ["GeneratedTask", "Task"],
  },
)
