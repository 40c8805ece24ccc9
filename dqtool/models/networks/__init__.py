"""Networks built from files: float ones from model sources (`loading`), quantized ones from manifests (`packed`)."""
