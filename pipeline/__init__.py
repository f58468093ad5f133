"""What runs inside a worker, and the offline tools; never imports `launch`."""
