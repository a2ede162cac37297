"""Fast implementations of attention and adaLN, which ``moh_dit.model`` defines."""
