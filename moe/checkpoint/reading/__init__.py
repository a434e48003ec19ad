"""Reading checkpoints: finding a folder or a model on the Hub, its summary, and loading it into a model."""
