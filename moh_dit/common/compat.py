"""Private interfaces of torch, diffusers and accelerate that this package uses, in one place.

Each function says why it is needed and since which version the interface exists.
"""
