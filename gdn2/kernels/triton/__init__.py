"""The GPU implementation: one family of Triton kernels for every mixer."""
