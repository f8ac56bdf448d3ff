"""Observers and quantizers as modules: grids, states, ranges, and finding them in a model."""
