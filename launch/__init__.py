"""The command line, and Ray: how runs are started and watched."""
