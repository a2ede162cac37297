"""Fast implementations of attention, adaLN and the MLP, which ``moh_dit.model`` defines."""
