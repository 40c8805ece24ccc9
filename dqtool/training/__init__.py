"""How quantized weights are learned."""
