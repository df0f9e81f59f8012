"""Storage to samples: sources, images, faces, splits, conversations, data sets."""
