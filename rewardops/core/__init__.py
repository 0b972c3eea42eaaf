"""Plumbing that every family uses; private."""
