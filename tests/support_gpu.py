"""What tests of kernels for GPUs ask of JAX."""

import pytest

from kernels_pallas.common import lowering

needs_kernels = pytest.mark.skipif(
  lowering.NO_GPU_KERNELS is not None, reason=str(lowering.NO_GPU_KERNELS)
)
"""Skips on a JAX that compiles none."""

needs_tcgen05 = pytest.mark.skipif(
  lowering.NO_TCGEN05 is not None, reason=str(lowering.NO_TCGEN05)
)
"""Skips on a JAX that compiles none for Blackwell."""
