"""Kubernetes manifests for KubeRay, and the pods' preStop hook."""
