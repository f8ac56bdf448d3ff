"""Where biases are, and what batch norms tell of the values that layers read."""
