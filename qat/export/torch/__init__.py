"""`torch.export` programs, eager and for Inductor, and modules that torch itself runs."""
