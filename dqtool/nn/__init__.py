"""Building blocks of a quantized network: step-indexed quantizers, layers, attention, and their insertion into a network."""
