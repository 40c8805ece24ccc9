"""A float network recorded once, on shapes alone: its layers, blocks, roles, data flow, and modules that repeat.

Everything here reads structure from a forward pass on the `meta` device or from module interfaces; nothing quantizes.
"""
