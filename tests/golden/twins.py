"""GGUF twins of checkpoints, made by llama.cpp's own programs, and how to read their quantised tensors back."""
QUANTIZED = {}
