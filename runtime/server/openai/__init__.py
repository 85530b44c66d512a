"""OpenAI's API: chat completions, completions and models, translated to the server's operations."""
