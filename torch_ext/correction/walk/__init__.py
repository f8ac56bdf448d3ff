"""What corrections share: walks over layers, what they see, and checkpoints of it."""
