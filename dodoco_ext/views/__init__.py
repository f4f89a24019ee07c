"""Readers of a recording made for people: tables, listings, diagnoses."""
