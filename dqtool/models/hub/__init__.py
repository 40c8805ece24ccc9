"""Extensions of diffusers and peft: loading exported directories, LoRA on quantized layers, pipeline calls as runs."""
