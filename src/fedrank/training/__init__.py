"""Local training: the only place with torch and transformers."""
