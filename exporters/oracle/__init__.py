"""The oracles of an export: the merged base (`Base.reference`), and the training library itself (`source`)."""
