"""Nouns and small machinery; imports no other package of the house."""
