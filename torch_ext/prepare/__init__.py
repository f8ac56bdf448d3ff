"""Making a quantizable model of a float one: what is quantized, how, and where it hangs."""
