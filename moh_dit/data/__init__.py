"""Read labelled images and encode them into latents."""
