"""What Psyche's core and its sidecars say to one another: messages, store keys, tensors."""
