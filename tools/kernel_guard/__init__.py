"""What the kernels cost on GPUs that need not be there: compiled, counted, held to limits."""
