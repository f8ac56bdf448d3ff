"""Where quantizers go in a forward."""
