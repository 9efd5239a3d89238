"""The heart: denoise all samples that fit together, one step at a time."""
