"""Small fused kernels of a decode step, with a PyTorch reference beside each."""
