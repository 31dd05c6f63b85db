"""Files without trust in them: safetensors, memory maps, fields, paths."""
