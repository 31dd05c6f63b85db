"""Optimizers for LoRA: LoRA+, LoRA-Pro, LoRA-FA, Riemannian, ReLoRA."""
