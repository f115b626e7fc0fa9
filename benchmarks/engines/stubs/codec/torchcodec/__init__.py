"""Stands in for a build of torchcodec that does not load beside this torch. No video is read here."""

__version__ = "0.17.0"
