"""What a quantized network is made of: step-indexed quantizers, layers, attention, and how they are put in place."""
