"""Comparing rules on a model, the cost of each quantizer, and a report about all of them."""
