"""The training loop, its step and its state."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "loop": ["TrainConfig", "fit"],
    "objectives.objective": ["NextToken"],
    "state": ["TrainState", "create"],
    "step": ["make_eval_step", "make_train_step"],
  },
)
