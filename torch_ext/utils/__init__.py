"""What knows nothing of quantization: arguments, text, batches, modes, progress bars."""
