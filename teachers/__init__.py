"""Frozen domain teachers: they score what the student sampled, and never sample here."""
