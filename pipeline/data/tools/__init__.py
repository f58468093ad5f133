"""Offline tools: data sets from any source, made, verified, indexed and described."""
