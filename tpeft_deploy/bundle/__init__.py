"""Bundle directories, manifests and slots."""
