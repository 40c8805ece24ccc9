"""Commands: one file each at the top, shared parts beside them."""
