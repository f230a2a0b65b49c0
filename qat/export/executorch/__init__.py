"""`.pte` files for ExecuTorch with XNNPACK."""
