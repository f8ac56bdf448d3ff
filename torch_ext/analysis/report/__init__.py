"""One HTML page about every quantizer: measurements, pictures, advice."""
