"""Manifests for KubeRay, and what pods run besides the training."""
