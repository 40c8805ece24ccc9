"""Triton kernels of the `cuda` runtime. Importing a module here needs Triton; nothing here allocates or launches."""
