"""Modules whose own call reads or returns something quantized: classes derived for them."""
