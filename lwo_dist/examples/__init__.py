"""Small models for tests and first tries."""
