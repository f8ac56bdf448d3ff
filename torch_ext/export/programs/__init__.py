"""Programs of PT2E, which engines of PyTorch lower."""
