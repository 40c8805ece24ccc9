"""Training of quantized weights and quantizers: methods, loops over blocks or the whole network, and their optimizer."""
