"""Calibration: runs data through a prepared model, on one process or many, and solves ranges."""
