"""Writing checkpoints: tensors into safetensors files, and a whole folder atomically."""
