"""The GPU's cases, with their inputs, timer and ceilings; ../run_gpu.py runs them."""
