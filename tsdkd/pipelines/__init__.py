"""Runs of more than one stage; a stage reads files and writes files."""
