"""ONNX files, for ONNX Runtime and for other engines that read them."""
