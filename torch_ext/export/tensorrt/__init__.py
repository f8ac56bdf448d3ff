"""TensorRT's calibration cache, a calibrator that hands it over, and its rules for ONNX files."""
