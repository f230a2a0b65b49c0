"""`.gguf` files for llama.cpp."""
