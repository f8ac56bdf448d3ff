"""Captures a forward, and inserts quantizers where the table of operations asks for them."""
