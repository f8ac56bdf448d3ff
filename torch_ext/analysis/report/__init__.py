"""The HTML report about every quantizer: measurements, pictures, advice."""
