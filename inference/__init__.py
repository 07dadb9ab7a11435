"""How programs are learned, sampled and conditioned: from arrays and labels to fits and labelled draws."""
