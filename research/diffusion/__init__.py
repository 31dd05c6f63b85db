"""Masked diffusion language models: LLaDA, its ancestors and successors."""
