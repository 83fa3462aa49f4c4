"""Encoders of a module of one's own (`model.encoder=module:…`): their text, and some of ours."""
