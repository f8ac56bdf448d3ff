"""Finds the batch norms that follow a layer, and folds them into it."""
