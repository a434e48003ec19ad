"""Files of a checkpoint folder: headers, config.json, families and tensor names. Needs no torch."""
