"""Corrects what quantization shifted: biases, norms and weights of a calibrated model."""
