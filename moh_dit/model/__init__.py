"""The model: attention, routing, transformer and presets. These files define the mathematics."""
