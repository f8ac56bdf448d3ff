"""Which rule suits a model, which quantizers cost most, and a page about all of them."""
