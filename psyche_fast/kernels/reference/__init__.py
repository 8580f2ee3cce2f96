"""The operations in plain PyTorch, on any device: transforms are batched over the class."""
