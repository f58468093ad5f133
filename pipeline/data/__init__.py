"""Data: what a folder holds, which sample comes when and how it is cropped, and its pixels."""
