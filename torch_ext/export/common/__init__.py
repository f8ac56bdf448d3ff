"""Shared by the formats: choosing quantizers, names in the network, tracing the forward."""
