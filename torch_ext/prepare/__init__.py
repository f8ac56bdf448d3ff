"""Prepares a float model for quantization: chooses what is quantized and attaches quantizers."""
