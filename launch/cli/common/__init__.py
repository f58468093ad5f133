"""Shared parts of the commands: options, consoles, tables and reports."""
