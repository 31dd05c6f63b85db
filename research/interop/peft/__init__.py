"""Adapters in PEFT's and llama.cpp's formats, read and written."""
