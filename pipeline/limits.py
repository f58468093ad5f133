"""Default limits, for modules that must import fast."""

MAX_PIXELS = 178_956_970  # per image, the same as PIL's against decompression bombs
