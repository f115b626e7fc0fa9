"""Stands in for a build of torchaudio that does not load beside this torch. No audio is read here."""

__version__ = "2.11.0"
