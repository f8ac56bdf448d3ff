"""What a channel can be scaled by without changing what the model computes, and by how much."""
