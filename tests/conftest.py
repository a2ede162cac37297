"""Tests never ask the network: with this, a missing name fails at once instead of after retries."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
