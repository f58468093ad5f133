"""All that knows Ray: clusters, workers, jobs. No other room imports it."""
