"""`.tflite` files for LiteRT (TensorFlow Lite)."""
