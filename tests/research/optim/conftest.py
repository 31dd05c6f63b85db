"""The problem of least squares that training's own tests run."""

from tests.research.training.conftest import line

__all__ = ["line"]
