"""TensorRT's calibration cache, a calibrator that returns it, and the rules for ONNX files."""
