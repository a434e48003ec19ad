"""Writing of checkpoints: tensors into safetensors files, and folders atomically."""
