"""Reading of checkpoints: finding a folder or a model on the Hub, summarising it, and loading it."""
