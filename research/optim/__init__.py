"""Optimizers, schedules and rates."""
