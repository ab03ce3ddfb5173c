"""Check arguments against a spec and bind them to a Call."""
