"""Sources of base models: torch modules, ONNX files, Hugging Face and diffusers directories, bundles."""
