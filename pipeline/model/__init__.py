"""DenseNets; importing `pipeline.model.densenet` registers the project's additions with timm."""
