"""Pieces that observers and quantizers are made of."""
