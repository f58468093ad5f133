"""The command line and Ray: starts and monitors runs."""
