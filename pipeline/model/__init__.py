"""DenseNet models. Importing `pipeline.model.densenet` registers the project's own models with timm."""
