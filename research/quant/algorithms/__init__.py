"""Which codes: GPTQ, AWQ, SmoothQuant, rotations, training."""
