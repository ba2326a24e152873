"""Runs workflows without the page."""
