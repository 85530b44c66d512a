"""Operations of the server, independent of the protocol."""
