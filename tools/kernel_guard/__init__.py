"""What the kernels cost on GPUs that need not be present: compiled, counted, held to limits."""
