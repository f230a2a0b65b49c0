"""What quantization costs and what it does: counts and bytes, and statistics of every grid."""
