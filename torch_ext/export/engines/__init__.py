"""Exported files as engines run them: integer layers, speed, and differences to VALIDATION."""
