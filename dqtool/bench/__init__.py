"""Speed, load time and memory of a quantized network and of what it competes with, measured alike."""
