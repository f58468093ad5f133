"""Data: class folders and shards, the sample order, crops and augmentations, and the pixels."""
