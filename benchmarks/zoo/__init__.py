"""Models of other packages, each prepared, checked and compared with torchao's PT2E."""
