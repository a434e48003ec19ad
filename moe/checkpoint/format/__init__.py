"""The files of a checkpoint folder and what they mean: headers, config.json, families, names of tensors. No torch."""
