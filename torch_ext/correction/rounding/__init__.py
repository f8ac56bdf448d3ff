"""Rounds a layer's weight to its grid so that the layer computes what it did."""
