"""Text of a bundle with a tokenizer: tokens of a text, text of tokens, chat templates, generation defaults."""
