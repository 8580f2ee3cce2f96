"""The operations as Triton kernels: on GPUs, or on the CPU by Triton's interpreter."""
