"""Files of the registry: blobs, uploads, disk space, locks."""
