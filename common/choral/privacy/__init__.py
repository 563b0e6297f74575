"""Differential privacy: what a release costs (`accounting`), and the noise that pays for it (`noise`)."""
