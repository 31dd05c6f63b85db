"""Low-bit arithmetic: integers, minifloats, codebooks, scale searches."""
