"""What an adapter has learned: spectra, memory, pictures."""
