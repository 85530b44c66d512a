"""Parts of models in slot form: attention over caches of fixed size, encoders with their memory, and decoders."""
