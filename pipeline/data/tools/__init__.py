"""Offline tools: create, verify, index and describe data sets from any supported source."""
