"""Choice of tokens from the largest logits of a row, so that whole logits stay on the device."""
