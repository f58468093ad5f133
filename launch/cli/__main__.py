"""`python -m launch.cli`: the `densenet` command where its script is not installed, as in a Ray job."""

from launch.cli import main

main()
