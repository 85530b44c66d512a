"""What decoders read beside tokens: results of encoders, and features of images."""
