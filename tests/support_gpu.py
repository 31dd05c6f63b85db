"""What tests of kernels for GPUs ask of JAX."""

import pytest

from kernels_pallas.common import target_platform

needs_kernels = pytest.mark.skipif(
  target_platform.NO_GPU_KERNELS is not None,
  reason=str(target_platform.NO_GPU_KERNELS),
)
"""Skips on a JAX that compiles none."""

needs_tcgen05 = pytest.mark.skipif(
  target_platform.NO_TCGEN05 is not None, reason=str(target_platform.NO_TCGEN05)
)
"""Skips on a JAX that compiles none for Blackwell."""
