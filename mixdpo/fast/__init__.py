"""The same numbers in less time or memory: Triton kernels, the optimizer, the allocator."""
