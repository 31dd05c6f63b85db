"""Diagnosis of adapters: singular spectra, intruder dimensions, memory."""
