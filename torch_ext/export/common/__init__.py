"""What several formats need: the exported quantizers, names in the network, the traced forward."""
