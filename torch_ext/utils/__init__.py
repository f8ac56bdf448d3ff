"""Helpers that are independent of quantization: arguments, text, batches, modes, progress bars."""
